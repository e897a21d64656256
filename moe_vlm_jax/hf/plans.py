"""Which tensor fills which parameter, decided and checked on headers before any weight is read.

A model may come from one folder (MoE-LLaVA, LLaVA) or from up to three (language model, vision tower, projector).
Nothing is dropped silently: what the model lacks, what it cannot use and what has another shape is one ValueError;
what is left out on purpose is in the Report.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_vlm_jax import config as config_lib
from moe_vlm_jax import tree
from moe_vlm_jax.hf import configs, families, names, readers
from moe_vlm_jax.hf import pieces as pieces_lib
from moe_vlm_jax.models import placement
from moe_vlm_jax.models import projector as projector_lib


@dataclasses.dataclass
class Report:
    """What a load took and what it left out.

    Attributes:
      tensors, bytes: read from the checkpoints.
      ignored: tensors that no computation reads (buffers, the text tower of CLIP, ...), of all sources.
      not_taken: tensors of a section that came from elsewhere or was not asked for.
      discarded: tensors that the reference discards too (the bias of Phi-2's head).
      casts: {'float16 -> float32': number of tensors}.
      random: leaves that were initialised at random because the caller asked for it.
      notes: remarks of the config reader.
    """

    tensors: int = 0
    bytes: int = 0
    ignored: list[str] = dataclasses.field(default_factory=list)
    not_taken: list[str] = dataclasses.field(default_factory=list)
    discarded: list[str] = dataclasses.field(default_factory=list)
    casts: dict[str, int] = dataclasses.field(default_factory=dict)
    random: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def lines(self) -> list[str]:
        """Returns the report as text, one fact a line."""
        lines = [f"{self.tensors} tensors, {self.bytes / 2**20:.1f} MiB read"]
        lists = {
            "ignored (no computation reads them)": self.ignored,
            "not taken (of a section that came from elsewhere)": self.not_taken,
            "discarded, as the reference does": self.discarded,
            "initialised at random, as asked": self.random,
        }
        lines += [f"{len(found)} {what}: {shown(found, 4)}" for what, found in lists.items() if found]
        lines += [f"{count} tensors cast {cast}" for cast, count in self.casts.items()]
        return lines + self.notes


class Source(NamedTuple):
    """One checkpoint and the top-level names of our parameters that are taken from it."""

    label: str
    tensors: Mapping[str, readers.Tensor]
    entries: Sequence[names.Entry]
    sections: frozenset[str]


class Plan(NamedTuple):
    """Everything needed to fill the leaves; made from headers alone."""

    specs: dict[str, jax.ShapeDtypeStruct]
    pieces: dict[str, list[tuple[pieces_lib.Piece, readers.Tensor]]]  # by leaf
    random: dict[str, np.ndarray]
    report: Report


def make(
    specs: Mapping[str, jax.ShapeDtypeStruct],
    folder: str | pathlib.Path,
    config: config_lib.ModelConfig,
    *,
    vision: str | pathlib.Path | None = None,
    projector: str | pathlib.Path | None = None,
    random_projector_seed: int | None = None,
    accept: Sequence[str] = (),
) -> Plan:
    """Returns where every leaf comes from, or raises everything that is wrong at once; reads headers only."""
    info = configs.read(folder, vision=vision, accept=accept)
    wanted = {path.split("/")[0] for path in specs}
    mistakes = configs.differences(config, info, wanted)
    report = Report(notes=list(info.notes))
    sources, random, problems = _sources(info, config, wanted, vision, projector, random_projector_seed)
    mistakes += problems
    shapes = {path: tuple(spec.shape) for path, spec in specs.items()}
    groups = placement.group_layers(config.layer_experts)
    plan = Plan(dict(specs), {path: [] for path in specs}, random, report)
    report.random = sorted(random)
    for source in sources:
        mistakes += _bind(source, shapes, groups, config, plan)
    if mistakes:
        raise ValueError(
            f"checkpoint {str(folder)!r} does not fit the model:\n"
            + "\n".join(mistakes)
            + "\nUse the config that `hf.configs.read` returns for this folder, or complete the checkpoint."
        )
    return plan


def shown(found: Sequence[Any], limit: int = 20) -> str:
    """Returns a list as text, cut at limit with a count of the rest."""
    rest = f", ... and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(map(str, found[:limit])) + rest


def _sources(info, config, wanted, vision, projector, seed) -> tuple[list[Source], dict[str, np.ndarray], list[str]]:
    """Decides which checkpoint fills which section: (sources, random leaves, mistakes)."""
    tensors = readers.open_checkpoint(info.folder)
    entries = best_entries(tensors, info.layout, info.family, config.projector)
    held = {section for section in ("decoder", "vision", "projector") if _holds(tensors, entries, section)}
    sections, sources, random, mistakes = {"decoder"} & wanted, [], {}, []
    if "vision" in wanted:
        tower = vision or (None if "vision" in held else info.vision_folder)
        if tower is not None:
            found = readers.open_checkpoint(tower)
            sources.append(Source(str(tower), found, best_entries(found, "vision", None, ""), frozenset({"vision"})))
        elif "vision" in held:
            sections.add("vision")
        else:
            mistakes.append(
                f"no vision tower: {info.folder} holds none and none is beside it; give `vision`, a folder."
            )
    if "projector" in wanted:
        if projector is not None:
            found = readers.open_checkpoint(projector)
            root = best_entries(found, "projector", info.family, config.projector)
            sources.append(Source(str(projector), found, root, frozenset({"projector"})))
        elif seed is not None:
            random = _random_projector(config, seed)
        elif "projector" in held:
            sections.add("projector")
        else:
            mistakes.append(
                f"no projector: {info.folder} holds none; give `projector`, the file of stage 1, or "
                "`random_projector_seed` to start from a random one."
            )
    return [Source(str(info.folder), tensors, entries, frozenset(sections)), *sources], random, mistakes


def best_variant(
    tensors: Mapping[str, Any], layout: str, family: families.Family | None, projector: str
) -> names.Layout:
    """Returns the variant of a layout whose table names most of the tensors."""
    table = family.table if family else None

    def named(variant: names.Layout) -> int:
        pattern = _pattern(names.table(layout, variant, table, projector))
        return sum(pattern.fullmatch(name) is not None for name in tensors)

    return max(names.LAYOUTS[layout], key=named)


def best_entries(
    tensors: Mapping[str, Any], layout: str, family: families.Family | None, projector: str
) -> tuple[names.Entry, ...]:
    """Returns the table of that variant."""
    variant = best_variant(tensors, layout, family, projector)
    return names.table(layout, variant, family.table if family else None, projector)


def _holds(tensors: Mapping[str, Any], entries: Sequence[names.Entry], section: str) -> bool:
    pattern = _pattern([e for e in entries if e.ours[0].startswith(f"{section}/")])
    return any(pattern.fullmatch(name) for name in tensors)


def _pattern(entries: Sequence[names.Entry]) -> re.Pattern[str]:
    """Returns a pattern of the tensor names of a table; a table without entries matches nothing."""
    escaped = [re.escape(e.hf).replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+") for e in entries]
    return re.compile("|".join(escaped) or r"(?!)")


def _bind(source: Source, shapes, groups, config: config_lib.ModelConfig, plan: Plan) -> list[str]:
    """Adds the pieces of one source to the plan; returns its mistakes."""
    own = {path: shape for path, shape in shapes.items() if path.split("/")[0] in source.sections}
    pieces = pieces_lib.build(source.entries, own, groups)
    if lost := pieces_lib.uncovered(pieces, own):
        return [f"{source.label}: no tensor table names the parameter(s) {shown(lost)}; extend hf/names.py."]
    expected = pieces_lib.tensor_shapes(pieces, own)
    missing = [name for name in expected if name not in source.tensors]
    misshaped = [
        f"{name}: the file has {source.tensors[name].shape}, the model needs {shape}"
        for name, shape in expected.items()
        if name in source.tensors and source.tensors[name].shape != shape
    ]
    odd = [
        f"{name}: {source.tensors[name].dtype}"
        for name in expected
        if name in source.tensors and not jnp.issubdtype(source.tensors[name].dtype, jnp.floating)
    ]
    unused = _sort_out(source, set(expected), config, plan.report)
    for piece in pieces:
        if piece.tensor in source.tensors:
            plan.pieces[piece.path].append((piece, source.tensors[piece.tensor]))
    found = [source.tensors[name] for name in expected if name in source.tensors]
    plan.report.tensors += len(found)
    plan.report.bytes += sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in found)
    kinds = {"missing": missing, "unused": unused, "mis-shaped": misshaped, "not floating point": odd}
    return [f"{source.label}: {len(found)} {kind} tensor(s): {shown(found)}" for kind, found in kinds.items() if found]


def _sort_out(source: Source, expected: set[str], config: config_lib.ModelConfig, report: Report) -> list[str]:
    """Returns the tensors that nothing uses; those that are left out for a reason go to the report."""
    elsewhere = _pattern([e for e in source.entries if e.ours[0].split("/")[0] not in source.sections])
    ignorable = re.compile("|".join(names.IGNORABLE))
    embedding = [e.hf for e in source.entries if e.ours == ("decoder/embed/embedding",)]
    unused = []
    for name in sorted(set(source.tensors) - expected):
        if elsewhere.fullmatch(name):
            report.not_taken.append(name)
        elif ignorable.fullmatch(name):
            report.ignored.append(name)
        elif name.endswith("lm_head.bias") and not config.decoder.lm_head_bias and config.decoder.parallel_block:
            report.discarded.append(name)
        elif name.endswith("lm_head.weight") and config.decoder.tie_embeddings:
            if not _equal(source.tensors[name], source.tensors.get(embedding[0])):
                unused.append(f"{name} (tie_embeddings=True, but it differs from {embedding[0]})")
            else:
                report.ignored.append(name)
        else:
            unused.append(name)
    return unused


def _equal(a: readers.Tensor, b: readers.Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a.read(), b.read())


def _random_projector(config: config_lib.ModelConfig, seed: int) -> dict[str, np.ndarray]:
    dims = config.vision.embed_dim, config.decoder.embed_dim
    dtype = jnp.dtype(config.param_dtype)
    module = projector_lib.Projector(config.projector, *dims, dtype=dtype, rngs=nnx.Rngs(seed))
    return {f"projector/{path}": np.asarray(v.get_value()) for path, v in tree.leaves(nnx.state(module)).items()}
