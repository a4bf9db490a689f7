"""Preflights: what is counted, against hand counts; topologies; figures of the TPU compiler."""

import dataclasses
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import toy
from jax.sharding import PartitionSpec

from robust_ft import checks, command_line, gin_config
from robust_ft.errors import UserError
from robust_ft.objectives.meta_learning import Fomaml
from robust_ft.optim import AdamW, Schedule
from robust_ft.partitioning import Partitioner
from robust_ft.preflight import __main__ as preflight
from robust_ft.preflight import programs, report, topology
from robust_ft.preflight.compiled import collective_bytes, needed
from robust_ft.preflight.report import Row
from robust_ft.recipe import Recipe

ROOT = Path(__file__).parents[2]
GIB = 2**30
META = ("prompt/Stage.gradient=@Fomaml()", "prompt/Stage.trainable=['peft', 'base']")


def run_preflight(*flags, timeout=600):
    """Runs the command line in a process of its own, whose environment is set before JAX."""
    command = [sys.executable, "-m", "robust_ft.preflight", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


# --- Topologies


def test_larger_slices_of_a_kind():
    assert topology.larger("v5e:2x4")[:3] == ("v5e:2x4", "v5e:4x4", "v5e:4x8")
    assert topology.larger("v5e")[0] == "v5e:1x1"
    assert topology.larger("v5p")[0] == "v5p:2x2x1"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5ee:2x4", r"--topology=v5ee:2x4 .* v4, v5e, v5p, v6e.*Did you mean 'v5e'"),
        ("v5e:2x5", r"no slice of v5e; there are 1x1, 2x2, .*Did you mean '2x\d'"),
        ("8xH100", "names no TPU"),
    ],
)
def test_unknown_topologies(name, message):
    with pytest.raises(UserError, match=message):
        topology.larger(name)


def test_a_kind_without_a_shape():
    with pytest.raises(UserError, match="v5e lacks a shape; write one of v5e:1x1, v5e:2x2"):
        topology.describe("v5e")


def test_mistakes_are_one_sentence_before_anything_is_compiled():
    process = run_preflight("--gin_file=gin_configs/promot_rte.gin", "--topology=v5e:3x4")
    assert process.returncode == 2
    assert process.stderr.startswith("Error: --topology=v5e:3x4 is no slice of v5e")
    assert process.stderr.count("\n") == 1


# --- Counting


def test_bytes_a_device():
    partitioner = Partitioner().on(jax.devices()[:1])
    struct = jax.ShapeDtypeStruct((4, 6), jnp.bfloat16, sharding=partitioner.replicated)
    assert programs.bytes_a_device({"a": struct, "b": {"c": struct}}) == 2 * 48
    abstract = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
    split = jax.sharding.NamedSharding(abstract, PartitionSpec("model", "data"))
    struct = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=split)
    assert programs.bytes_a_device(struct) == 2 * 2 * 4


def test_what_a_meta_learning_rule_reads_and_carries():
    rule = Fomaml(2, 3, AdamW(Schedule(1.0)), carries_state=True)
    stage = toy.stage(trainable=[".*"], gradient=rule)
    program = programs.train_step(Recipe("toy", "unused", (stage,)), stage)
    _, _, batch, *_ = program.traced.args_info[0][1:]
    assert batch["encoder_input_mask"].shape == (4, 2, 4, 12)
    # Two moments of each parameter for each of two optimizers, and steps done: one of Adam and one
    # of its schedule, and these for both parts in the inner loop.
    assert program.optimizer_bytes == 4 * program.parameter_bytes + 6 * 4


PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %gathered = bf16[8,128]{1,0:T(8,128)} all-gather(%half), channel_id=1, dimensions={0}
}

%cond (state: (s32[], f32[8,128])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[16]) -> f32[16] {
  %start = (f32[16]{0}, f32[64]{0}) all-gather-start(%x), channel_id=2, dimensions={0}
  %done = f32[64]{0} all-gather-done(%start)
  %both = (f32[3]{0}, s32[]) all-reduce(%p, %q), to_apply=%add
  %loop = (s32[], f32[8,128]) while(%init), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_collectives_are_counted_as_often_as_they_run():
    assert collective_bytes(PROGRAM) == {
        "all-gather": 64 * 4 + 5 * 8 * 128 * 2,
        "all-reduce": 3 * 4 + 4,
    }
    assert collective_bytes("") == {}


# As libtpu writes loops: of two scans one inside the other, and one until all is decoded.
LOOPS = """HloModule jit_step, is_scheduled=true

%inner_body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gathered = f32[8]{0:T(8)} all-gather(%x), channel_id=1, dimensions={0}
}

%inner_condition (state: (s32[], f32[8])) -> pred[] {
  %seven = s32[]{:T(128)} constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %seven), direction=LT, metadata={op_name="while/cond/lt"}
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %sum = f32[2]{0} all-reduce(%x), channel_id=2
  %loop.1 = (s32[], f32[8]) while(%init), condition=%inner_condition, body=%inner_body
}

%condition (state: (s32[], f32[8])) -> pred[] {
  %four = s32[]{:T(128)} constant(4)
  ROOT %lt.2 = pred[]{:T(512)} compare(%i, %four), direction=LT
}

%decoding (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %moved = f32[3]{0} collective-permute(%x), channel_id=3
}

%until (state: (s32[], f32[8])) -> pred[] {
  %most = s32[]{:T(128)} constant(64)
  %lt.3 = pred[]{:T(512)} compare(%i, %most), direction=LT
  ROOT %and = pred[]{:T(512)} and(%lt.3, %open)
}

ENTRY %main (x: f32[16]) -> f32[16] {
  %loop.2 = (s32[], f32[8]) while(%init), condition=%condition, body=%body
  %loop.3 = (s32[], f32[8]) while(%init), condition=%until, body=%decoding
}
"""


def test_loops_without_a_trip_count_are_counted_by_their_condition():
    assert collective_bytes(LOOPS) == {
        "all-gather": 4 * 7 * 8 * 4,
        "all-reduce": 4 * 2 * 4,
        "collective-permute": 3 * 4,
    }


# As libtpu writes them: one gathering that runs beside a product, and a sum over two slices.
ASYNCHRONOUS = """HloModule jit_step, is_scheduled=true

%started (x: f32[8]) -> (f32[8], f32[16], u32[]) {
  %gathered.1 = f32[16]{0} all-gather(%x), channel_id=7, replica_groups={{0,1},{2,3}}
  ROOT %start = (f32[8]{0}, f32[16]{0}, u32[]) custom-call(%gathered.1), \
custom_call_target="AsyncCollectiveStart"
}

%beside (x: f32[8], y: f32[4,4]) -> (f32[4,4], f32[8], f32[16]) {
  %gathered.2 = f32[16]{0} all-gather(%x), channel_id=7, replica_groups={{0,1},{2,3}}
}

%done (x: f32[8]) -> f32[16] {
  %gathered.3 = f32[16]{0} all-gather(%x), channel_id=7, replica_groups={{0,1},{2,3}}
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (f32[8]{0}, f32[16]{0}, u32[]) fusion(%x), kind=kCustom, calls=%started
  %b = (f32[4,4]{1,0}, f32[8]{0}, f32[16]{0}) fusion(%x, %y), kind=kOutput, calls=%beside
  %c = f32[16]{0} fusion(%x), kind=kCustom, calls=%done
}

ENTRY %main (x: f32[16]) -> f32[16] {
  %loop = (s32[], f32[8]) while(%init), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %sum = f32[5]{0} all-reduce(%x), channel_id=1, to_apply=%add
  %send = (f32[5]{0}, u32[], token[]) send(%sum, %after), channel_id=4, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %receive = (f32[5]{0}, u32[], token[]) recv(%after), channel_id=3, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %received = (f32[5]{0}, token[]) recv-done(%receive), channel_id=3, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
}
"""


def test_what_runs_beside_other_work_is_counted_once():
    assert collective_bytes(ASYNCHRONOUS) == {
        "all-gather": 3 * 16 * 4,
        "all-reduce": 5 * 4,
        "between slices": 5 * 4,
    }


def test_what_the_compiler_says_that_does_not_fit():
    prefix = "RESOURCE_EXHAUSTED: "
    all_of_it = prefix + "Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm."
    assert needed(all_of_it, GIB) == int(16.5 * GIB)
    temporary = prefix + (
        "Ran out of memory on HBM, the total memory required for HLO temporaries (40.04G) "
        "exceeds available HBM (15.75G)."
    )
    assert needed(temporary, 2 * GIB) == int(40.04 * GIB) + 2 * GIB
    assert needed("INTERNAL: something else", GIB) is None


def test_a_row_as_json():
    row = Row("model", "train_step", "v5e:2x2", 4, 5, 4, 2, 1, 9, {"all-gather": 3}, 0.5, ("x",))
    assert row.to_json() == {
        "stage": "model",
        "program": "train_step",
        "topology": "v5e:2x2",
        "chips": 4,
        "peak_bytes": 5,
        "hbm_bytes": 4,
        "parameter_bytes": 2,
        "optimizer_bytes": 1,
        "activation_bytes": 2,
        "flops": 9,
        "collectives": {"all-gather": 3},
        "collective_bytes": 3,
        "compile_seconds": 0.5,
        "fits": False,
        "advice": ("x",),
    }


# --- Choosing


def test_stages_and_programs_can_be_chosen(monkeypatch):
    recipe = gin_config.load(["gin_configs/promot_rte.gin"]).recipe
    assert [stage.name for stage in preflight._chosen(recipe, None)] == ["prompt", "model"]
    assert [stage.name for stage in preflight._chosen(recipe, ["model"])] == ["model"]
    with pytest.raises(UserError, match=r"--stage=modle .*\['prompt', 'model'\].* mean 'model'"):
        preflight._chosen(recipe, ["modle"])
    made = []
    for name in ("train_step", "decode_step"):
        program = types.SimpleNamespace(optimizer_bytes=2, _replace=dict)
        monkeypatch.setattr(programs, name, lambda *_, program=program: program)
    compiled = types.SimpleNamespace(peak_bytes=5)
    monkeypatch.setattr(report, "_compiled", lambda *_: made.append(1) or compiled)
    monkeypatch.setattr(report, "_row", lambda *each: each[-1])
    place = types.SimpleNamespace()

    def peaks(*names):
        return list(report.of_stage(recipe, recipe.stages[0], place, names))

    assert (peaks("train_step"), peaks("infer_step"), len(made)) == ([5], [5], 2)
    assert (peaks("decode_step", "infer_step"), len(made)) == ([7, 5], 3)


# --- Settings and advice


def recipe_on(chips, *bindings, **mesh):
    """Returns the mini ProMoT recipe over devices that are not there."""
    recipe = gin_config.load(["gin_configs/promot_rte.gin"], bindings).recipe
    devices = [fake_device(i) for i in range(chips)]
    return dataclasses.replace(recipe, partitioner=Partitioner(**mesh).on(devices))


def test_settings_go_from_fast_to_slow():
    tried = list(report.settings(recipe_on(1)))
    assert tried[:4] == [
        (),
        ("FULLY_SHARDED=-1",),
        ("FULLY_SHARDED=-1", "T5Config.remat='full'"),
        ("FULLY_SHARDED=-1", "T5Config.remat='full'", "MICROBATCHES=2"),
    ]
    assert set(tried[-1][2:]) == {"T5Config.param_dtype='bfloat16'", "MICROBATCHES=8"}
    for bindings in tried:
        gin_config.load(["gin_configs/promot_rte.gin"], bindings)


def test_find_takes_the_first_that_fits(monkeypatch):
    def rows(_, name, bindings):
        peak = 10 // topology_chips(name) - 3 * ("T5Config.remat='full'" in bindings)
        for stage in ("prompt", "model"):
            yield row_of(stage, name, peak)

    monkeypatch.setattr(preflight, "_rows", rows)
    parser = command_line.gin_parser("preflight", "")
    arguments = command_line.parse_gin(parser, ["--gin_file=gin_configs/promot_rte.gin"])
    found, bindings = preflight._find(arguments, topology.larger("v5e")[:3])
    # One chip needs 10, or 7 with remat; four need 2.
    assert [row.topology for row in found] == ["v5e:2x2", "v5e:2x2"]
    assert bindings == ()


def test_advice_is_about_what_the_config_does_not_do_yet():
    recipe = recipe_on(4)
    row = dataclasses.replace(row_of("model", "v5e:2x2", 9), chips=4)
    advice = " ".join(report._advice(recipe, recipe.stage("model"), row))
    for setting in ("FULLY_SHARDED=-1", "dtype='bfloat16'", "remat='full'", "MICROBATCHES=2"):
        assert setting in advice
    recipe = recipe_on(4, "T5Config.remat='full'", fully_sharded=-1)
    advice = " ".join(report._advice(recipe, recipe.stage("model"), row))
    assert "FULLY_SHARDED" not in advice and "remat" not in advice


def test_heads_that_the_mesh_does_not_divide():
    checks.check(recipe_on(8, model_parallel=4))
    with pytest.raises(UserError, match=r"T5Config.num_heads: 4 heads .* 8 devices .* 'model'"):
        checks.check(recipe_on(8, model_parallel=8))


def test_batches_that_the_mesh_does_not_divide():
    with pytest.raises(
        UserError, match=r"batch_size=64 of .* does not divide over the 128 devices"
    ):
        checks.check(recipe_on(128))


@pytest.mark.parametrize(
    ("rows", "chips", "message"),
    [
        (16, 32, r"=16 .* 32 devices .* choose 32, or .*model_parallel=2 leave 16 of them"),
        (18, 4, r"=18 .* 4 devices .* choose 16 or 20, or .*model_parallel=2 leave 2 of them"),
    ],
)
def test_rows_of_meta_batches_that_the_mesh_does_not_divide(rows, chips, message):
    with pytest.raises(UserError, match="Stage.batch_size" + message):
        checks.check(recipe_on(chips, *META, f"BATCH_SIZE={rows}"))


def test_a_meta_batch_is_divided_into_its_tasks():
    recipe = recipe_on(4, *META, "T5Config.remat='full'", "MICROBATCHES=32", fully_sharded=-1)
    recipe = dataclasses.replace(recipe, stages=recipe.stages[:1])
    tried = [bindings[-1] for bindings in report.settings(recipe) if bindings]
    assert tried[:2] == [f"prompt/Stage.microbatches={count}" for count in (64, 128)]
    row = dataclasses.replace(row_of("prompt", "v5e:2x2", 9), chips=4)
    (advice,) = [each for each in report._advice(recipe, recipe.stages[0], row) if "task" in each]
    assert advice == "Compute fewer than 4 tasks side by side with prompt/Stage.microbatches=64."


class FakeDevice(types.SimpleNamespace):
    def __hash__(self):
        return id(self)


def fake_device(i):
    return FakeDevice(id=i, platform="cpu", device_kind="cpu", process_index=0)


def topology_chips(name):
    return math.prod(map(int, name.split(":")[1].split("x")))


def row_of(stage, name, peak):
    return Row(stage, "train_step", name, topology_chips(name), peak, 4, 1, 1, 1, None, 0.0)


# --- The compiler's figures; tolerance 3 %


def figures(file):
    rows = json.loads(file.read_text())
    return {(row["stage"], row["program"]): row for row in rows}


@pytest.mark.tpu
def test_a_small_recipe(tmp_path):
    file = tmp_path / "rows.json"
    process = run_preflight(
        "--gin_file=gin_configs/prompt_rte.gin",
        "--topology=v5e:2x2",
        "--gin.FULLY_SHARDED=2",
        f"--json={file}",
    )
    assert process.returncode == 0, process.stderr
    rows = figures(file)
    assert set(rows) == {("prompt", p) for p in ("train_step", "decode_step", "infer_step")}
    for row in rows.values():
        assert (row["topology"], row["chips"], row["fits"]) == ("v5e:2x2", 4, True)
        assert row["hbm_bytes"] == int(15.75 * GIB)
        assert 0 < row["parameter_bytes"] < row["peak_bytes"]
        assert row["collective_bytes"] > 0
        assert "flops" in row and row["flops"] > 0
    golden = {"train_step": 8_664_064, "decode_step": 12_971_408, "infer_step": 12_969_472}
    for (_, program), row in rows.items():
        assert row["peak_bytes"] == pytest.approx(golden[program], rel=0.03)
    train = rows["prompt", "train_step"]
    # 10 vectors of 96, split over 2 chips of 4, and their second moments.
    assert train["optimizer_bytes"] < 2 * 10 * 96 * 4
    assert "prompt" in process.stdout and "decode_step" in process.stdout


@pytest.mark.slow
@pytest.mark.tpu
def test_slices_send_each_other_little(tmp_path):
    file = tmp_path / "rows.json"
    process = run_preflight(
        "--gin_file=gin_configs/prompt_rte.gin",
        "--topology=v5e:2x2",
        "--gin.SLICES=2",
        "--gin.FULLY_SHARDED=-1",
        f"--json={file}",
    )
    assert process.returncode == 0, process.stderr
    assert "2 slices of v5e:2x2, 8 chips" in process.stdout
    rows = figures(file)
    for row in rows.values():
        assert (row["topology"], row["chips"], row["fits"]) == ("2 slices of v5e:2x2", 8, True)
    # The prompt's gradient, 10 vectors of 96, some sums, and what fills tiles up.
    sent = rows["prompt", "train_step"]["collectives"]
    assert 10 * 96 * 4 / 4 <= sent["between slices"] <= 16_384 < sent["all-gather"]
    # Decoding only asks the others whether they are through.
    assert rows["prompt", "decode_step"]["collectives"]["between slices"] <= 1024


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.parametrize(
    ("stage", "topology", "golden", "settings"),
    [
        ("model", "v5e:2x4", {"train_step": 11.54}, ()),
        ("prompt", "v5e:2x2", {"train_step": 8.50, "decode_step": 11.30}, ("EVAL_BATCH_SIZE=4",)),
    ],
)
def test_the_whole_of_mt5_xxl(tmp_path, stage, topology, golden, settings):
    """The figures of docs/performance.md, in GiB; minutes and 11 GB of memory for each program."""
    file = tmp_path / "rows.json"
    process = run_preflight(
        "--gin_file=gin_configs/promot_rte.gin",
        "--gin_file=gin_configs/scale/mt5_xxl.gin",
        f"--topology={topology}",
        f"--stage={stage}",
        *[f"--program={program}" for program in golden],
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 512, 'targets': 128}",
        *[f"--gin.{setting}" for setting in settings],
        f"--json={file}",
        timeout=3600,
    )
    assert process.returncode == 0, process.stderr
    peaks = {program: row["peak_bytes"] / GIB for (_, program), row in figures(file).items()}
    assert peaks == pytest.approx(golden, rel=0.03)
