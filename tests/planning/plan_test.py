"""Plans: the compiled step takes what was counted, what does not fit is said, and figures go out as JSON."""

import dataclasses
import json

import jax
import pytest

from moe_vlm_jax import collectives
from moe_vlm_jax import config as config_lib
from moe_vlm_jax.planning import chips, estimate, memory, meshes, plan, report, shapes, targets
from tests.planning import examples


def tpu():
    pytest.importorskip("libtpu", reason="libtpu, the optional extra 'plan', is not installed")
    return targets.find("v5e", examples.run_config(qlora=True).mesh)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "qlora", "dpo"])
def test_the_compiled_step_takes_the_bytes_that_were_counted(kind):
    qlora = kind != "full"
    config = examples.run_config(qlora=qlora)
    if kind == "dpo":
        config.model.lora.dropout = 0.0
        config.preference = config_lib.PreferenceConfig(loss="sigmoid", pairs="pairs.jsonl")
    made = plan.make_plan(config, targets.find("local", config.mesh), compiled=True)
    assert made.program is not None
    unused = 2 * 12 * 4 if qlora else 0  # jit drops the tower's last norm, which only its text tower reads
    assert made.program.arguments == sum(group.bytes for group in made.groups.values()) - unused
    state = sum(made.groups[name].bytes for name in memory.GROUPS if name.startswith(("trainable", "opt", "count")))
    assert made.program.aliased == state  # the whole state is donated
    assert (made.groups["reference"].bytes > 0) == (kind == "dpo")
    assert made.program.temporaries > 0
    assert made.program.flops is not None and made.program.flops > 0
    assert made.fits and made.left is not None and made.left < made.capacity


def test_a_plan_of_one_step_tells_its_shape():
    config = examples.run_config(qlora=True)
    made = plan.make_plan(config, targets.find("local", config.mesh), compiled=False)
    assert made.step == {"micro_batches": 2, "rows": 2, "row_length": 144, "images": 4, "tokens_per_image": 4}
    assert made.mesh == {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}
    assert (made.program, made.fits, made.left) == (None, None, None)
    assert report.table(made).endswith("not compiled")


class TooLarge:
    """Stands for a lowered step that the compiler refuses."""

    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 25.20G of 15.75G hbm. Exceeded hbm capacity by 9.45G.\n\nTotal hbm usage >= 25.45G:\n    reserved 258.00M"
    )

    def lower(self, *arguments):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_program_that_the_compiler_refuses_does_not_fit(monkeypatch):
    config = examples.run_config(qlora=True)
    monkeypatch.setattr(shapes.setup, "make_step", lambda *arguments: TooLarge())
    made = plan.make_plan(config, targets.find("local", config.mesh), compiled=True)
    assert made.fits is False
    assert made.refusal == "Used 25.20G of 15.75G hbm. Exceeded hbm capacity by 9.45G."
    assert report.verdict(made) == f"DOES NOT FIT: the compiler refuses: {made.refusal}"
    monkeypatch.setattr(TooLarge, "message", "INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        plan.make_plan(config, targets.find("local", config.mesh), compiled=True)


def planned(**changes) -> plan.Plan:
    program = plan.Program(
        arguments=4 * 2**30,
        outputs=2**30,
        aliased=2**30,
        temporaries=5 * 2**30,
        code=2**20,
        peak=8 * 2**30,
        flops=12.5e12,
        unknown_flops="",
        memory_traffic=300e9,
        exchanges=(
            plan.Exchange("all-to-all", ("expert",), 96, 8 * 2**30, 6 * 2**30, 0.0),
            plan.Exchange("all-gather", ("data", "expert"), 7, 2 * 2**30, 2**30, 2**29),
        ),
        unknown_traffic="",
        compile_seconds=61.0,
    )
    made = plan.Plan(
        target="v5e",
        kind="TPU v5 lite",
        remark="",
        mesh={"data": 2, "fsdp": 1, "expert": 4, "tensor": 1},
        step={"micro_batches": 1, "rows": 4, "row_length": 1088, "images": 4, "tokens_per_image": 576},
        coverage=[],
        parameters={"model": memory.Count(5_610_000_000, 3_930_000_000, 3_932_160)},
        groups={name: memory.Group(0, 0, 0) for name in memory.GROUPS} | {"batch": memory.Group(0, 2**31, 2**30)},
        capacity=16 * 2**30,
        program=program,
        refusal="",
        estimate=estimate.Estimate(
            compute=0.25,
            memory=0.125,
            hidden_collectives=0.05,
            exposed_collectives=0.5,
            model_flops=15e12,
            peak_flops=100e12,
        ),
        no_estimate="",
        suggestion=meshes.Candidate({"data": 1, "fsdp": 2, "expert": 4, "tensor": 1}, 2.0**31, 2.0**30, 5.0 * 2**30),
    )
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "fits: 7.00 GiB of 16.00 GiB are left (44%)"),
        ({"capacity": 8 * 2**30}, "DOES NOT FIT: 1.00 GiB more than the 8.00 GiB of a device"),
        ({"capacity": None}, "the device does not tell how much memory it has"),
        ({"program": None}, "not compiled"),
    ],
)
def test_the_verdict(changes, said):
    assert report.verdict(planned(**changes)) == said


def test_the_table_names_every_part():
    text = report.table(planned(remark="a note"))
    assert "v5e: TPU v5 lite, data 2, expert 4" in text
    assert "step: 1 x 4 rows of 1,088 slots, with 4 images of 576 tokens" in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    for row in (
        "all-to-all expert 96 8.00 GiB 6.00 GiB 0.0 MiB",
        "all-gather data+expert 7 2.00 GiB 1.00 GiB 512.0 MiB",
        "sum 103 10.00 GiB 7.00 GiB 512.0 MiB",
        "memory traffic 125.0 ms",
        "step takes at least 750.0 ms",
        "model FLOPs utilisation 20.0% at most",
        "slots a second 5,803 at most",
        "(max of the first three + the fourth; mostly exposed collectives; nothing was measured)",
    ):
        assert row in rows, row
    suggestion = (
        "--config.mesh.fsdp=2 --config.mesh.expert=4 (estimated: 3.00 GiB of a device, 5.00 GiB sent in a step)"
    )
    assert rows[-1] == f"suggested: {suggestion}"
    for row in ("5,610,000,000", "2.00 GiB          1.00 GiB", "temporaries", "12.50 TFLOP", "61 s", "note: a note"):
        assert row in text
    unknown = dataclasses.replace(planned().program, flops=None, unknown_flops="a loop without an end", peak=None)
    assert "unknown: a loop without an end" in report.table(planned(program=unknown))


def test_no_estimate_says_why_and_no_mesh_what_to_do():
    text = report.table(planned(estimate=None, no_estimate="the target's rates are not known", suggestion=None))
    assert "no estimate of the step's time: the target's rates are not known" in text
    assert "suggested" not in text
    text = report.table(planned(capacity=2**30, suggestion=None))
    assert "no mesh of data, fsdp and expert over 8 devices is estimated to fit (with training.batch_size=4" in text
    same = meshes.Candidate({"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}, 2.0**31, 2.0**30, 5.0 * 2**30)
    assert "this mesh is the one that fits and sends least" in report.table(planned(suggestion=same))


def test_a_float32_run_has_no_estimate():
    config = examples.run_config(qlora=True)
    program = planned().program
    assert program is not None
    chip = chips.CHIPS["v5e"]
    assert plan._no_estimate(program, chip, config) == "published rates are of bfloat16, not of float32"
    config.model.compute_dtype = "bfloat16"
    assert plan._no_estimate(program, chip, config) == ""
    assert plan._no_estimate(program, None, config) == "the target's rates are not known"


def test_a_count_that_cannot_be_made_is_a_reason_and_not_the_end():
    def cannot(text: str) -> float:
        raise ValueError(f"{text} has a loop without an end")

    assert plan._known(cannot, "this") == (None, "this has a loop without an end")
    assert plan._known(len, "this") == (4, "")
    program = dataclasses.replace(planned().program, unknown_traffic="a loop without an end")
    config = examples.run_config(qlora=True)
    assert plan._no_estimate(program, chips.CHIPS["v5e"], config) == "a loop without an end"


def test_collectives_are_summed_by_kind_and_axes():
    def found(kind, groups, count, asynchronous):
        return collectives.Collective(kind, "", "", groups, len(groups[0]), asynchronous, count, 100.0)

    pairs = ((0, 1), (2, 3), (4, 5), (6, 7))
    summed = plan.exchanges(
        [
            found("all-gather", pairs, 3, True),
            found("all-gather", pairs, 1, False),
            found("all-gather", ((0, 4), (1, 5), (2, 6), (3, 7)), 1, False),
            found("all-reduce", ((0,), (1,)), 9, False),  # of single devices
        ],
        {"data": 2, "fsdp": 1, "expert": 2, "tensor": 2},
    )
    assert summed == (
        plan.Exchange("all-gather", ("tensor",), 4, 400.0, 200.0, 150.0),
        plan.Exchange("all-gather", ("data",), 1, 100.0, 50.0, 0.0),
    )


def test_json_has_the_figures_of_the_table():
    values = json.loads(json.dumps(report.as_json(planned())))
    assert values["fits"] is True and values["bytes_left"] == 7 * 2**30 - 2**20
    assert values["parameters"]["model"] == {"total": 5610000000, "activated": 3930000000, "trainable": 3932160}
    assert values["groups"]["batch"] == {"parameters": 0, "bytes": 2**31, "device_bytes": 2**30}
    assert values["program"]["temporaries"] == 5 * 2**30
    assert values["program"]["exchanges"][0]["axes"] == ["expert"]
    assert values["estimate"]["step"] == 0.75 and values["estimate"]["bound"] == "exposed collectives"
    assert values["suggestion"]["mesh"]["fsdp"] == 2


@pytest.mark.slow
def test_a_tpu_that_is_not_there_is_planned_for():
    target = tpu()
    made = plan.make_plan(examples.run_config(qlora=True), target, compiled=True)
    assert made.kind == "TPU v5 lite" and made.capacity == 16 * 2**30
    assert made.program is not None
    # Tiles of 8 x 128 pad small arrays.
    assert made.program.arguments >= sum(group.bytes for group in made.groups.values())
    assert made.program.flops is not None
    assert made.fits
