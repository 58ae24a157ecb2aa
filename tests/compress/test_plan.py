"""`nanohybrid plan compress`: what fits, how much it takes, how fast it can be, and the paper's own
candidates among it."""

import json

import pytest
import torch
from compress_models import DENSE, make_model

import nanohybrid
from nanohybrid.cli.main import main
from nanohybrid.compress.plan import PAPER, grid_of, plan, prior
from nanohybrid.compress.recipe import CompressRecipe
from nanohybrid.compress.search import Grid
from nanohybrid.errors import ConfigError, InputError
from nanohybrid.estimate import Footprint
from nanohybrid.estimate.budget import STEP, Budget, activation_bytes, matrix_bytes
from nanohybrid.estimate.devices import DEVICES, GIB, device
from nanohybrid.estimate.roofline import decode_step
from nanohybrid.prune.activations import measure_activations
from nanohybrid.prune.depth_importance import rank_layers
from nanohybrid.prune.target import Target

TWELVE, NINE = nanohybrid.preset("nano-12b-v2"), nanohybrid.preset("nano-9b-v2")
BUDGET = Budget(int(19.66 * GIB), 131_072, step=STEP)
# hidden size, FFN, Mamba heads at 56 layers: parameters, tok/s on an A10G at 8k/16k, batch 8 (section 4)
PAPERS = {
    (4480, 17920, 112): (8_923_356_912, 161.02),
    (4480, 15680, 128): (8_888_227_328, 156.42),
    (4800, 14400, 120): (8_965_788_600, 155.86),
}
SMALL_GRID = Grid(
    drop_layers=(0, 2),
    multiple=4,
    fractions={
        "hidden_size": (1.0, 0.75),
        "intermediate_size": (1.0, 0.5),
        "mamba_num_heads": (1.0, 0.5),
        "mamba_head_dim": (1.0,),
    },
)


def shape_of(hidden, ffn, heads):
    return NINE.replace(hidden_size=hidden, intermediate_size=ffn, mamba_num_heads=heads)


@pytest.fixture(scope="module")
def papers_plan():
    few = Grid(
        PAPER.drop_layers,
        {
            **PAPER.fractions,
            "hidden_size": PAPER.of("hidden_size")[2:],
            "intermediate_size": (*PAPER.of("intermediate_size")[::2], 14400 / 20480, 15680 / 20480),
        },
    )
    return plan(TWELVE, BUDGET, device("a10g"), grid=few)


def test_device_budget_of_an_a10g_is_the_paper_s():
    assert device("a10g").budget(int(1.3 * GIB)) / GIB == pytest.approx(19.66, abs=0.005)
    assert not Budget(device("a10g").budget(), 131_072).fits(TWELVE) and Budget(
        device("h100").budget(), 131_072
    ).fits(TWELVE)


def test_grid_of_the_12b_is_the_paper_s():
    assert grid_of(TWELVE) is PAPER and grid_of(NINE) is not PAPER
    assert {round(5120 * share) for share in PAPER.of("hidden_size")} == {4480, 4640, 4800, 4960, 5120}
    ffn = {20480 * share for share in PAPER.of("intermediate_size")}
    assert {13440, 14400, 15680, 17920, 20480} <= ffn and min(ffn) == 13440


def test_plan_has_the_paper_s_candidates_with_equal_parameters(papers_plan):
    found = {
        (s.config.hidden_size, s.config.intermediate_size, s.config.mamba_num_heads): s
        for s in papers_plan.shapes[::-1]
    }
    at_56 = {key: s for key, s in found.items() if s.config.num_hidden_layers == 56}
    assert {key: at_56[key].parameters for key in PAPERS} == {
        key: count for key, (count, _) in PAPERS.items()
    }
    assert at_56[4480, 15680, 128].config == NINE
    assert all(
        s.memory.total <= BUDGET.bytes and s.config.pattern.count("*") == 4 for s in papers_plan.shapes
    )
    assert [s.quality for s in papers_plan.shapes] == sorted(
        (s.quality for s in papers_plan.shapes), reverse=True
    )


def test_prior_orders_shapes_as_the_paper_measured_them():
    def lost(layers, hidden, ffn, heads):
        return prior(
            TWELVE,
            Target(
                layers=layers,
                sizes={"hidden_size": hidden, "intermediate_size": ffn, "mamba_num_heads": heads},
            ),
        )

    widths = [
        lost(56, 4480, 15680, 128),
        lost(56, 4800, 14400, 120),
        lost(56, 4480, 17920, 112),
    ]  # 63.02, 62.94, 59.07
    depths = [lost(layers, 5120, 20480, 128) for layers in (56, 54, 52)]  # 51.48, 47.35, 44.92
    assert widths == sorted(widths) and depths == sorted(depths) and prior(TWELVE, Target()) == 0


def test_roofline_orders_the_paper_s_candidates_as_they_were_measured():
    held = Budget(1, 16_384, 8)  # the mean length of 8k in and 16k out
    speeds = {key: decode_step(shape_of(*key), held).tokens_per_second(device("a10g")) for key in PAPERS}
    assert sorted(PAPERS, key=lambda key: -speeds[key]) == sorted(PAPERS, key=lambda key: -PAPERS[key][1])
    assert all(0.65 < PAPERS[key][1] / speeds[key] < 0.75 for key in PAPERS)  # what the paper reached of it


@pytest.mark.parametrize(
    ("name", "batch", "context", "want"),
    [
        ("a10g", 1, 16_384, 35),
        ("a10g", 8, 16_384, 228),
        ("l4", 8, 16_384, 114),
        ("h100", 64, 16_384, 4111),
        ("a10g", 1, 131_072, 31.5),
    ],
)
def test_roofline_equals_a_calculation_by_hand(name, batch, context, want):
    weights, state = (NINE_PARAMETERS - 131_072 * 4480) * 2, 27 * (128 * 80 * 128 * 4 + 12_288 * 3 * 2)
    step = decode_step(NINE, Budget(1, context, batch), tile=1)
    assert step.bytes == weights + batch * (context * 16_384 + 2 * state + 16_384)
    assert step.tokens_per_second(device(name)) == pytest.approx(want, rel=0.02)


NINE_PARAMETERS = 8_888_227_328


def test_budget_counts_quantized_matrices_and_leaves_the_rest_in_bf16():
    whole, eight, four = (Budget(1, 1024, dtype=kind).memory(NINE) for kind in ("bf16", "int8", "int4"))
    assert whole.kv == eight.kv and whole.state == four.state
    table = 131_072 * 4480 * 2
    matrices = NINE_PARAMETERS - table / 2
    assert eight.weights == pytest.approx(
        table + matrices * (1 + 2 / 128) + 25 * 4480 * 15_680 / 64, rel=1e-3
    )  # down_proj: groups of 64
    assert four.weights == pytest.approx(table + matrices * (1 / 2 + 2 / 32), rel=1e-3)
    assert matrix_bytes((3, 64), "int4") == 3 * (32 + 4) and matrix_bytes((3, 40), "int8") == 3 * 42
    assert matrix_bytes((3, 40), "int4") == 3 * 40 * 2 and matrix_bytes((3, 64), "fp8") == 3 * (64 + 4)
    with pytest.raises(ConfigError, match="--quantize int8"):
        CompressRecipe(dtype="int8")


def test_activation_bytes_are_an_upper_bound(model):
    """No tensor that the forward makes is missing: the sum of a layer's outputs that are alive at once is
    below the reserve."""
    layer = max(sum(t.numel() for t in outputs) for outputs in watch(model, tokens=64))
    assert layer * 4 <= activation_bytes(model.config, 64, 1, "fp32")


def watch(model, tokens):
    """The outputs of the modules of each block, one list a block."""
    found = []
    for block in model.backbone.layers:
        outputs = []
        found.append(outputs)
        for module in block.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda _m, _i, out, outputs=outputs: outputs.append(out))
    model(torch.arange(tokens)[None] % 60)
    return found


def test_plan_uses_measured_importance_instead_of_the_prior(model, calibration):
    scores = measure_activations(model, calibration)
    ranking = rank_layers(model, calibration)
    budget, profile = Budget(10**9, 64, dtype="bf16"), device("cpu")
    by_prior = plan(model.config, budget, profile, None, SMALL_GRID)
    widths = plan(model.config, budget, profile, scores, SMALL_GRID)
    both = plan(model.config, budget, profile, scores.with_layers(ranking.score_L, ranking.order), SMALL_GRID)
    assert len({by_prior.estimate, widths.estimate, both.estimate}) == 3
    assert len(by_prior.shapes) == len(widths.shapes) == len(both.shapes) == 16
    assert all(
        p.shapes[0].quality == pytest.approx(1) and p.shapes[0].target == Target()
        for p in (by_prior, widths, both)
    )
    dropped = {s.target.drop_layers for s in both.shapes} - {()}
    assert dropped == {tuple(sorted(ranking.order[:2]))}
    for shape in both.shapes:
        assert (
            shape.config == shape.target.config(model.config, None)
            and shape.parameters == Footprint.of(shape.config).parameters
        )
    with pytest.raises(InputError, match="another shape"):
        plan(make_model("M-").config, budget, profile, scores, SMALL_GRID)


def test_plan_puts_a_base_model_that_fits_first_for_a_dense_model():
    dense = make_model("*-*-*-", **DENSE).config
    found = plan(dense, Budget(10**9, 64, step=STEP), device("cpu"))
    assert found.shapes[0].config == dense and {s.config.mamba_num_heads for s in found.shapes} == {
        dense.mamba_num_heads
    }


def test_plan_compress_command_prints_json_and_a_table(tmp_path, capsys):
    assert (
        main(
            [
                "plan",
                "compress",
                "--preset",
                "mini",
                "--device",
                "l4",
                "--context",
                "512",
                "--batch",
                "2",
                "--json",
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert (
        told["device"] == "l4"
        and told["budget_bytes"] == DEVICES["l4"].budget()
        and told["rejected_count"] == 0
    )
    first = told["candidates"][0]
    assert (
        first["config"]["pattern"] == nanohybrid.preset("mini").pattern
        and first["tokens_per_second_estimate"] > 0
    )
    for candidate in told["candidates"]:
        parts = candidate["bytes"]
        assert (
            parts["total"] == parts["weights"] + parts["kv"] + parts["state"] + parts["reserve"]
            and parts["reserve"] > 0
        )
    assert (
        main(
            [
                "plan",
                "compress",
                "--preset",
                "mini",
                "--budget-gib",
                "0.015",
                "--context",
                "512",
                "--show",
                "3",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "shapes fit" in text and "prior" in text and "nanohybrid prune PATH" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one of the two"),
        (["--preset", "mini"], "--budget-gib G, or --device"),
        (["--preset", "mini", "--budget-gib", "0.001"], "nearest --budget-gib"),
        (["--preset", "mini", "--budget-gib", "-1"], "must be positive"),
        (["--preset", "mini", "--budget-gib", "1e-12"], "must be positive"),
        (["--preset", "mini", "--budget-gib", "nan"], "budget_gib"),
        (["--preset", "mini", "--device", "a10"], "nearest a10g"),
        (["--preset", "mini", "--device", "a10g", "--reserved-gib", "30"], "20.96 GiB"),
        (["--preset", "mini", "--device", "a10g", "--context", "0"], "at least 1"),
        (["--preset", "mini", "--device", "a10g", "--dtype", "int3"], "int3"),
        (["--preset", "nano-12b-v2", "--budget-gib", "1", "--context", "131072"], "the smallest takes 16.2"),
    ],
)
def test_plan_compress_command_refuses_in_one_line_and_names_the_nearest(capsys, flags, message):
    assert main(["plan", "compress", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
