"""Every setting of a run, as dataclasses with their rules.

A config file (configs/*.py) returns a `RunConfig`; the command line overrides fields of it
(`--config.optimizer.learning_rate=1e-4`); `validate` then checks all rules at once, before anything is compiled.
Field comments name the trap, not the type. Standard library only.
"""

import dataclasses

PLACEMENTS = ("none", "sparse", "dense", "first_half", "second_half")


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class VisionConfig:
    """A CLIP or SigLIP vision transformer; the defaults are CLIP ViT-L/14 at 336 px."""

    image_size: int = 336
    patch_size: int = 14
    embed_dim: int = 1024
    mlp_dim: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    norm_eps: float = 1e-5
    activation: str = "quick_gelu"  # CLIP: quick_gelu; SigLIP: gelu_tanh
    class_token: bool = True  # CLIP: True; SigLIP: False
    pre_norm: bool = True  # CLIP normalises its embeddings once more before the first block
    patch_bias: bool = False  # SigLIP: True
    select_layer: int = -2  # hidden state handed on: -2 is the output of the second-last block
    # Leading tokens withheld from the language model. CLIP: 1 (the class token). SigLIP: 0; a checkpoint that
    # MoE-LLaVA trained with SigLIP needs 1, because its code drops the first real patch there.
    skip_tokens: int = 1
    position_init_std: float = 0.02  # raise to ~0.5 when training from nothing, or positions drown

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Image tokens that one image puts into the language model's sequence (P)."""
        return self.num_patches + int(self.class_token) - self.skip_tokens


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class DecoderConfig:
    """A decoder-only language model; the defaults are Phi-2."""

    vocab_size: int = 51200
    embed_dim: int = 2560
    mlp_dim: int = 10240
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 80
    rotary_dim: int = 32  # leading dims of a head that rotate; head_dim for Llama and Qwen
    rope_theta: float = 10000.0
    max_positions: int = 2048  # a longer row is an error, not a silent extrapolation
    norm: str = "layernorm"  # layernorm | rmsnorm
    norm_eps: float = 1e-5
    parallel_block: bool = True  # Phi-2: x + attention(norm x) + mlp(norm x) with one norm
    gated_mlp: bool = False  # True: down(act(gate x) * up x); False: down(act(up x))
    activation: str = "gelu_tanh"  # gelu_tanh | gelu | silu
    qkv_bias: bool = True
    output_bias: bool = True  # bias of the attention output projection
    mlp_bias: bool = True
    lm_head_bias: bool = False  # plain Phi-2 has one; LLaVA-Phi discards it
    tie_embeddings: bool = False
    embed_dropout: float = 0.0
    residual_dropout: float = 0.0
    embed_init_std: float = 0.02  # raise to ~0.5 when training from nothing


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class MoEConfig:
    """Which layers hold experts, how tokens reach them, and the losses on the router."""

    placement: str = "sparse"  # sparse = layers 0, 2, 4, ...; ignored when layers is given
    layers: tuple[int, ...] = ()  # explicit layer indices
    num_experts: tuple[int, ...] = (4,)  # one for all MoE layers, or one per MoE layer
    # topk (over all experts) | modality (text and image tokens have experts of their own) | cluster (of the question)
    router: str = "topk"
    text_experts: tuple[int, ...] = ()  # modality only: what text may choose from; both together name all experts
    image_experts: tuple[int, ...] = ()
    clusters: str = ""  # cluster only: file of moe_vlm_jax.cluster_questions
    top_k: int = 2
    renormalize: bool = True  # weights sum to 1 over the chosen; top_k=1 always uses the raw probability
    dispatch: str = "dropless"  # dropless | capacity (the reference) | dense (every expert, the oracle)
    grouped_matmul: str = "auto"  # dropless only: ragged (TPU) | slots (GPU) | blocks (CPU) | auto by platform
    block_rows: int = 64  # rows of one block of 'blocks', and of what 'slots' has no slots for, at least
    capacity_factor: float = 1.5  # capacity only; the reference multiplies it by top_k
    eval_capacity_factor: float = 2.0
    min_capacity: int = 0
    capacity_group: str = "batch"  # tokens that compete for slots: the whole batch (reference) or each row
    # How a mesh's devices exchange tokens: shard_map (collectives written out) | gspmd (the compiler's choice, slower;
    # what the other is tested against).
    expert_parallel: str = "shard_map"
    use_residual: bool = False  # adds the dense MLP beside the experts, mixed by a learned coefficient
    balance_coef: float = 0.01  # times the SUM over MoE layers
    router_z_coef: float = 0.0
    # Parity with DeepSpeed 0.9.5; leave off for real work.
    padding_takes_capacity: bool = False  # padding also routes, fills slots and counts for balance
    gumbel_second_choice: bool = False  # second choice from noisy logits, also at inference
    random_token_selection: bool = False  # top_k=1: survivors of a full expert drawn at random


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class QuantConfig:
    """How frozen kernels are stored; they are dequantised inside the step, layer by layer."""

    kind: str = "none"  # none | nf4 | int4 | int8
    block: int = 64  # neighbouring inputs that share a scale; 0: all inputs of an output (per channel)
    double: bool = True  # the scales themselves in 8 bits: 0.516 instead of 0.5625 bytes a weight for nf4
    # Patterns over parameter paths. A router is refused. The default leaves out embeddings, head, tower and projector.
    targets: tuple[str, ...] = (r"decoder/groups/.*/(q|k|v|o|up|gate|down)/kernel",)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class LoraConfig:
    """Low-rank adapters beside linear layers (Hu et al. 2021); every expert gets factors of its own."""

    rank: int = 0  # 0: no adapters
    alpha: float = 16.0  # the update is scaled by alpha / rank
    dropout: float = 0.0  # on the input of the adapter only
    rslora: bool = False  # scale by alpha / sqrt(rank) instead (Kalajdzievski 2023)
    init: str = "kaiming"  # of A: kaiming (PEFT's default) | gaussian; B starts at zero
    # Patterns over paths of linear layers (not of their kernels). The router is refused: train it in full instead.
    targets: tuple[str, ...] = (r"decoder/groups/.*/attention/(q|k|v)",)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class ModelConfig:
    """The whole vision-language model."""

    vision: VisionConfig = dataclasses.field(default_factory=VisionConfig)
    projector: str = "mlp2x_gelu"  # linear | mlpNx_gelu | identity
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    quant: QuantConfig = dataclasses.field(default_factory=QuantConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    compute_dtype: str = "bfloat16"  # activations and matmuls; router, softmax, norms and losses stay float32
    param_dtype: str = "float32"  # trainable leaves and their gradients; use bfloat16 to halve memory
    # Repeats of a layer group in one iteration of its loop: more make larger programs. XLA:CPU is faster with all of
    # them in one (a loop copies weights in and residuals out), accelerators do not care.
    scan_unroll: int = 1
    remat: str = "full"  # none | full | dots (keeps matmul results)

    @property
    def layer_experts(self) -> tuple[int, ...]:
        """Experts of each decoder layer, 0 for a dense layer."""
        return layer_experts(self.moe, self.decoder.num_layers)

    @property
    def routes_by_question(self) -> bool:
        """Whether a token's experts depend on what is asked behind it, so that questions share no beginning."""
        return self.moe.router == "cluster" and any(self.layer_experts)


def layer_experts(moe: MoEConfig, num_layers: int) -> tuple[int, ...]:
    """Returns the number of experts of each of num_layers layers, 0 where the layer stays dense.

    >>> layer_experts(MoEConfig(placement="sparse", num_experts=(4,)), 4)
    (4, 0, 4, 0)
    """
    chosen = {
        "none": range(0),
        "sparse": range(0, num_layers, 2),
        "dense": range(num_layers),
        "first_half": range(num_layers // 2),
        "second_half": range(num_layers // 2, num_layers),
    }
    layers = tuple(moe.layers) or tuple(chosen[moe.placement])
    counts = tuple(moe.num_experts) * len(layers) if len(moe.num_experts) == 1 else tuple(moe.num_experts)
    experts = dict(zip(layers, counts, strict=True))
    return tuple(experts.get(i, 0) for i in range(num_layers))


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class DataConfig:
    """Where rows come from and how they become batches."""

    source: str = "embedded"  # embedded | easy_vqa | llava | infographicvqa
    path: str = ""  # llava: JSON file(s), comma separated; infographicvqa: the folder, or a parquet file
    image_folder: str = ""  # llava: images are relative to it
    cache: str = ""  # embedded: where rendered images go; empty: the user's cache folder
    difficulty: str = "mini"  # embedded: mini (64 px, closed vocabulary) | full (real layouts)
    num_images: int = 0  # embedded: how many to render; 0 is the preset's default
    # embedded: share of the answers to train on that are whole sentences ('the item is sun'), so that preferences have
    # something to shorten; accepted answers stay as they are.
    wordy_share: float = 0.0
    split: str = "train"
    eval_split: str = "val"  # empty: no evaluation
    # Keep only records of these answer types, of both splits, e.g. ("caption",) or ("image-span", "question-span");
    # empty: all. Not for llava, whose rows have none.
    answer_types: tuple[str, ...] = ()
    tokenizer: str = "closed"  # 'closed' (of the embedded mini set), 'easy_vqa', or a folder with tokenizer.json
    template: str = "plain_qa"  # plain | plain_qa | v1 | phi | stablelm | qwen | ...: all in data/templates.py
    answer_prompt: str = ""  # appended to a question, e.g. the benchmark's "single word or phrase" sentence
    image_aspect: str = "pad"  # pad | square
    max_text_tokens: int = 512  # text only: image tokens are counted apart
    max_pixels: int = 80_000_000  # a larger image is refused (or dropped); InfographicVQA has some of 59 million
    on_bad_sample: str = "error"  # error | drop (counted and reported)
    share_prefix: bool = True  # questions about one image share its tokens
    max_branches: int = 16  # questions in one tree
    pack: bool = True  # several trees in one row
    row_lengths: tuple[int, ...] = (256,)  # static row lengths; unpacked rows take the smallest that fits
    images_per_row: int = 4  # static room for images in a row
    num_workers: int = 0  # processes that build batches; 0 builds them in a thread of the trainer


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class OptimizerConfig:
    """Optimizer, schedule and clipping."""

    name: str = "adamw"  # adamw | muon (matrices by Muon, the rest by AdamW)
    learning_rate: float = 2e-5
    muon_learning_rate: float = 3e-3  # muon only
    schedule: str = "cosine"  # cosine | constant
    warmup_ratio: float = 0.03
    final_ratio: float = 0.0  # last learning rate / peak
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # on matrices: kernels and LoRA factors, not biases, norms or embeddings
    no_decay: tuple[str, ...] = ()  # patterns over parameter paths that are also left out of the decay
    # 'PATTERN=FACTOR': parameters whose learning rate is FACTOR times the usual, e.g. ".*/lora_b=16" for LoRA+.
    rates: tuple[str, ...] = ()
    moments_dtype: str = "float32"  # adamw's first moment; bfloat16 halves it (the second stays float32)
    max_grad_norm: float = 1.0


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class StgcConfig:
    """Sending tokens whose gradients oppose their expert's to other experts (STGC, arXiv 2406.19905)."""

    coefficient: float = 0.0  # beta, times the MEAN over layers of the conflict loss; 0: off. The paper's is 1.0
    threshold: float = 0.0  # tau: a token conflicts when the cosine of its gradient and the mean one is below it
    layers: tuple[int, ...] = ()  # (first, end) decoder layers whose routers get the loss; empty: all
    # router: into the router's kernel only, within the one backward pass | full: through hidden states, too, with a
    # second backward pass, as in the paper
    gradient: str = "router"
    alone: bool = False  # update by the conflict loss and nothing else, to see what it does; with 'full' only


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class TrainingConfig:
    """What trains, for how long, and what is written down."""

    trainable: tuple[str, ...] = ("projector/.*", "decoder/.*")  # patterns over parameter paths
    frozen: tuple[str, ...] = ("vision/.*",)  # together they must name every parameter exactly once
    # Folder of a checkpoint in HF layout (a dense one is upcycled); in a chain also '@NAME', the checkpoint that the
    # run NAME leaves; empty: random initial weights.
    base: str = ""
    base_vision: str = ""  # folder of the vision tower; empty: base's own, or the one that it names
    base_projector: str = ""  # file or folder; empty: base's own; 'random' draws a new one, as stage I does
    # Relative standard deviation of noise on the kernels of upcycled experts, which else start as equal copies. For
    # a dense base.
    upcycling_noise: float = 0.0
    # What was trained on this base, to go on from: the workdir of a run (in a chain also '@NAME'), or the folder of an
    # adapter in PEFT's layout; empty: new adapters.
    adapter: str = ""
    stgc: StgcConfig = dataclasses.field(default_factory=StgcConfig)
    seed: int = 0
    batch_size: int = 4  # rows of one micro-batch, over all devices
    accumulation: int = 2  # micro-batches of one step
    epochs: float = 3.0
    max_steps: int = 0  # > 0 replaces epochs
    loss_chunk: int = 1024  # tokens whose logits exist at one time on a device that holds rows; 0: all at once
    log_every: int = 10
    # Steps between images of the routing in TensorBoard (they take the extra 'analysis'); 0: none. Figures of it are
    # written every log_every steps anyway.
    routing_images_every: int = 0
    checkpoint_every: int = 200
    checkpoint_seconds: float = 0.0  # also save when this many seconds have passed; 0: never
    keep_checkpoints: int = 2


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class PreferenceConfig:
    """Training on pairs of answers of which one is better; without a loss, training is supervised."""

    # none | sigmoid (DPO) | robust | sigmoid_norm | hinge | ipo | kto_pair | simpo | orpo: losses/preference.py has the
    # formulas. Both streams run without dropout.
    loss: str = "none"
    beta: float = 0.1  # strength of the tie to the reference; the project report names none, 0.1 is the usual one
    label_smoothing: float = 0.0  # share of pairs believed to be marked the wrong way round (sigmoid: cDPO)
    gamma: float = 0.0  # simpo only: the margin of rewards to aim at
    sft_coef: float = 0.0  # times the cross-entropy of chosen answers, added to the loss
    # What the policy is compared with: 'start', the policy as it begins (the SFT model) | 'base', adapters off | the
    # workdir of a run or the folder of an adapter of the same shape, as for training.adapter.
    reference: str = "start"
    # File of the reference's log-probs; written before training if it does not exist. The step then runs the policy
    # alone. Relative to the workdir; empty: computed in every step.
    precomputed: str = ""
    # JSON lines of pairs (data/pairs.py), which replace data.split; prompts and images are read as data says, and
    # held-out questions come from data.eval_split. In a chain also '@NAME': sampled from what the run NAME leaves.
    pairs: str = ""
    held_out: float = 0.1  # share of the pairs, with all pairs of an image, that is measured and not trained on
    num_pairs: int = 1000  # to sample for pairs='@NAME', marked by the automatic rule (preferences/prefer.py)
    temperature: float = 1.0
    top_p: float = 1.0


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class GenerationConfig:
    """How answers are decoded."""

    max_new_tokens: int = 32
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # of the most probable tokens; 0: all
    top_p: float = 1.0  # of the probability mass, after top_k
    repetition_penalty: float = 1.0  # on tokens of the prompt and the answer; 1: none
    stop: tuple[str, ...] = ()  # texts that end an answer; they are not part of it
    seed: int = 0


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class EvaluationConfig:
    """The check before and after training."""

    max_questions: int = 500  # 0: all of the split
    every_steps: int = 0  # also while training, and keep the best checkpoint; its time is not training time; 0: never
    batch_size: int = 32
    controls: bool = True  # also score shuffled images and the best blind baseline
    page_samples: int = 48  # questions on the HTML page


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class MeshConfig:
    """Devices along each axis; the product must be the number of devices. data=0 takes what is left."""

    data: int = 0
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class RunConfig:
    """One run of `python -m moe_vlm_jax.train`."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    preference: PreferenceConfig = dataclasses.field(default_factory=PreferenceConfig)
    generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


@dataclasses.dataclass(kw_only=True)
class Chain:
    """Runs that build on each other, in the order of the fields; training.base='@stage1' is what stage1 leaves.

    A config file defines a subclass whose fields are RunConfigs and returns one of it:

        @dataclasses.dataclass(kw_only=True)
        class TwoStages(config.Chain):
            stage1: config.RunConfig
            stage2: config.RunConfig
    """
