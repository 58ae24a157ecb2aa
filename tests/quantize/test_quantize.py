"""`nanohybrid quantize` from disk to disk: equal to quantizing in memory, its measures of quality, and what
it refuses."""

import json
import math
from functools import partial

import pytest
import torch
from compress_models import SMALL, make_calibration

from nanohybrid.checkpoint import CheckpointReader, load, load_config, save
from nanohybrid.cli.main import main
from nanohybrid.config import HybridConfig
from nanohybrid.errors import InputError
from nanohybrid.estimate import Footprint
from nanohybrid.evaluate import EvaluateRecipe, evaluate
from nanohybrid.evaluate import accuracy as answers
from nanohybrid.evaluate.perplexity import loss_of
from nanohybrid.model import HybridLM
from nanohybrid.model.quantized import QuantizedLinear, format_in, quantizable, quantize_model
from nanohybrid.ops.quantized import FORMATS
from nanohybrid.prune.calibration import Calibration
from nanohybrid.prune.layerwise import StreamedModel
from nanohybrid.quantize import stage as stages
from nanohybrid.quantize.calibrate import PairedForward
from nanohybrid.quantize.layerwise import quantize_checkpoint
from nanohybrid.quantize.stage import QuantizeRecipe, quantize_stage
from nanohybrid.text import ChatTemplate, train_bpe

SIZES = {**SMALL, "hidden_size": 64, "intermediate_size": 96, "mamba_head_dim": 16, "vocab_size": 269}
TIED = dict(rope_theta=1e4, qk_norm=True, mlp_activation="swiglu", tie_word_embeddings=True)


@pytest.fixture(scope="module", params=["hybrid", "dense"])
def parent(request, tmp_path_factory):
    """A checkpoint with tokenizer, template and documents beside it: a hybrid with its own head, or a tied
    dense model."""
    folder = tmp_path_factory.mktemp("parent")
    train_bpe(["some words"], 269).save(folder)
    ChatTemplate.default().save(folder)
    config = (
        HybridConfig(pattern="M-*M-", **SIZES)
        if request.param == "hybrid"
        else HybridConfig(pattern="*-*-", **(SIZES | TIED))
    )
    save(HybridLM(config, seed=2).bfloat16(), folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 11], "temperature": 0.6}')
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"line {i} of some text and more"}) + "\n" for i in range(8))
    )
    return folder


def same(ours, theirs):
    first, second = ours.state_dict(), theirs.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(
            tensor.view(torch.uint8), second[name].view(torch.uint8)
        ), name


@pytest.mark.parametrize("format", FORMATS)
def test_quantize_without_documents_equals_quantizing_in_memory(parent, tmp_path, format, capsys):
    assert main(["quantize", str(parent), "--out", str(tmp_path / "a"), "--to", format, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    want, whole = load(parent), load(parent)
    head = {"lm_head.weight"} & quantizable(want.config).keys()
    assert quantize_model(want, format, quantize_head=False) == list(head)
    same(load(tmp_path / "a"), want)
    quantize_model(whole, format)
    same(load(tmp_path / "a", quantize=format), whole)
    same(load(parent, quantize=format), whole)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (parent / name).read_bytes()
    with CheckpointReader(tmp_path / "a") as reader:
        footprint = Footprint.of(reader.config, torch.bfloat16, format=format, quantize_head=False)
        shapes = 0 if format == "fp8" else 16 * len(reader.formats)
        assert reader.stored_bytes == footprint.weight_bytes + shapes == told["bytes_after"]
        assert reader.weight_bytes() == footprint.weight_bytes
        loaded = Footprint.of(reader.config, torch.bfloat16, format=format).weight_bytes
        assert reader.weight_bytes(format=format) == loaded
    assert told["bytes_after"] == sum(after for _, after in told["bytes_by_kind"].values())
    assert told["bytes_after"] == tensor_bytes(tmp_path / "a") and told["not_quantized"] == []
    assert told["bytes_before"] == Footprint.of(want.config).weight_bytes and "perplexity_before" not in told


@pytest.mark.parametrize("format", FORMATS)
def test_quantize_head_quantizes_the_head_and_names_it_as_a_target(parent, tmp_path, format):
    command = ["quantize", str(parent), "--out", str(tmp_path / "a"), "--to", format, "--quantize-head"]
    assert main(command) == 0
    untied = not load_config(parent).tie_word_embeddings
    whole = load(parent)
    quantize_model(whole, format)
    same(load(tmp_path / "a"), whole)
    said = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert sum("lm_head" in group["targets"] for group in said["config_groups"].values()) == untied
    assert ("lm_head" in said["ignore"]) != untied


def test_quantize_counts_the_second_copy_of_a_tied_head(tmp_path, capsys):
    model = HybridLM(HybridConfig("M-*", **SIZES, tie_word_embeddings=True), seed=1).bfloat16()
    save(model, tmp_path / "tied")
    assert (
        main(["quantize", str(tmp_path / "tied"), "--out", str(tmp_path / "a"), "--to", "int8", "--json"])
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["bytes_before"] == tensor_bytes(tmp_path / "tied")
    assert told["bytes_after"] == tensor_bytes(tmp_path / "a")


def tensor_bytes(directory):
    """Bytes of the tensors in the safetensors file of a directory."""
    raw = (directory / "model.safetensors").read_bytes()
    return len(raw) - 8 - int.from_bytes(raw[:8], "little")


@pytest.mark.parametrize("format", FORMATS)
def test_quantize_reports_the_measured_quality_of_both_checkpoints(parent, tmp_path, format, capsys):
    command = [
        "quantize",
        str(parent),
        "--out",
        str(tmp_path / "a"),
        "--to",
        format,
        "--calibration",
        str(parent / "text.jsonl"),
        "--json",
    ]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    documents = Calibration.read(parent / "text.jsonl", parent)
    evaluated = Calibration(documents.samples[1::2]) if format == "int4" else documents
    models = [load(path).eval() for path in (parent, tmp_path / "a")]
    losses = [loss_of(model, evaluated.batches()) for model in models]
    assert told["targets"] == losses[0].targets
    assert [told["perplexity_before"], told["perplexity_after"]] == pytest.approx(
        [loss.perplexity for loss in losses], rel=2e-3
    )
    logits = []
    with torch.no_grad():
        for model in models:
            found = [
                model(batch.tokens_T, batch.layout)[batch.targets_T >= 0] for batch in evaluated.batches()
            ]
            logits.append(torch.cat(found).double().log_softmax(-1))
    assert told["top1_agreement"] == pytest.approx(
        (logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean().item(), abs=0.011
    )
    divergence = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean().item()
    assert told["kl_divergence"] == pytest.approx(divergence, rel=0.05, abs=1e-6)
    page = (tmp_path / "a" / "report.html").read_text()
    assert "<svg" in page and "same at" in page


def test_quantize_problems_evaluates_both_models(parent, tmp_path, capsys, monkeypatch):
    """With and without documents; the accuracy equals that of the stage `evaluate`."""
    monkeypatch.setattr(
        answers, "EvaluateRecipe", partial(EvaluateRecipe, max_tokens=6)
    )  # a random model never ends its answer
    command = [
        "quantize",
        str(parent),
        "--to",
        "int4",
        "--problems",
        "2",
        "--tasks",
        '["parity", "sums"]',
        "--json",
    ]
    for name, more in (("a", []), ("b", ["--calibration", str(parent / "text.jsonl")])):
        assert main([*command, "--out", str(tmp_path / name), *more]) == 0
        told = json.loads(capsys.readouterr().out)
        assert list(told["accuracy"]) == ["before", "int4"] and ("perplexity_before" in told) == bool(more)
        page = (tmp_path / name / "report.html").read_text()
        assert ">Accuracy<" in page and (">Quality<" in page) == bool(more)
    recipe = EvaluateRecipe(
        ("parity", "sums"), 2, curve_models=(), contexts=(), thinking_budgets=(), max_tokens=6
    )
    evaluate(recipe, {"before": parent, "int4": tmp_path / "b"}, tmp_path / "evaluation")
    found = json.loads((tmp_path / "evaluation" / "summary.json").read_text())["accuracy"]
    for name, share in told["accuracy"].items():
        assert share["problems"] == 4 and share["accuracy"] == found[name]["thinking"]


def test_quantize_int4_weights_errors_by_inputs_and_evaluates_on_other_documents(parent, tmp_path):
    documents = Calibration.read(parent / "text.jsonl", parent)
    quantize_checkpoint(parent, "int4", tmp_path / "a", documents, quantize_head=True)
    # the same by another way: the whole model in fp32 with hooks, on the even documents
    model = load(parent).eval()
    seen = {}

    def hook(name):
        return lambda _, inputs: seen.setdefault(name, []).append(inputs[0].flatten(0, -2).float())

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    with torch.no_grad():
        for batch in Calibration(documents.samples[::2]).batches():
            model(batch.tokens_T, batch.layout)
    importance = {name: torch.cat(inputs).square().mean(0) for name, inputs in seen.items()}
    found, plain, weighed = load(tmp_path / "a"), load(parent), load(parent)
    quantize_model(plain, "int4")
    quantize_model(weighed, "int4", importance)
    differ = {
        name
        for name, tensor in found.state_dict().items()
        if not torch.equal(tensor, weighed.state_dict()[name])
    }
    assert not differ and any(
        not torch.equal(tensor, plain.state_dict()[name]) for name, tensor in found.state_dict().items()
    )


def test_paired_forward_equals_the_model_without_quantization(parent):
    documents = make_calibration()
    with CheckpointReader(parent) as reader, torch.no_grad():
        model = StreamedModel(reader, torch.float32)
        pair = PairedForward.of(model, documents, calibrate=False)
        for block in model.blocks():
            pair.run_layer(block, lambda squares: None)
        pair.run_norm(model.final_norm())
        want = [
            load(parent, torch.float32).hidden(batch.tokens_T, batch.layout) for batch in documents.batches()
        ]
    for found in (pair.before_TE, pair.after_TE):
        torch.testing.assert_close(torch.cat(found), torch.cat(want))
    assert pair.drift == [0.0] * model.config.num_hidden_layers


def test_quantize_restarts_after_an_interruption_and_gives_the_same_bytes(parent, tmp_path, monkeypatch):
    recipe = QuantizeRecipe("int4")
    quantize_stage(recipe, parent, tmp_path / "whole")
    real = stages.quantize_checkpoint

    def dying(model, format, directory, documents, advance, *more):
        def until(tensors):
            if (directory / ".checkpoint.writing").exists():
                raise KeyboardInterrupt
            advance(tensors)

        return real(model, format, directory, documents, until, *more)

    monkeypatch.setattr(stages, "quantize_checkpoint", dying)
    with pytest.raises(KeyboardInterrupt):
        quantize_stage(recipe, parent, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(stages, "quantize_checkpoint", real)
    quantize_stage(recipe, parent, tmp_path / "cut")
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    quantize_stage(recipe, parent, tmp_path / "cut")  # done: nothing is done again
    assert not list(tmp_path.glob("*.partial"))


def test_quantize_names_matrices_that_int4_cannot_hold(tmp_path, capsys):
    save(
        HybridLM(HybridConfig(pattern="M-", **{**SIZES, "intermediate_size": 112}), seed=0).bfloat16(),
        tmp_path / "odd",
    )
    assert main(["quantize", str(tmp_path / "odd"), "--out", str(tmp_path / "a"), "--to", "int4"]) == 0
    assert "not quantized" in (said := capsys.readouterr().out) and "1 matrices" in said
    assert isinstance(
        load(tmp_path / "a").get_submodule("backbone.layers.1.mixer.down_proj"), torch.nn.Linear
    )


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    save(HybridLM(HybridConfig(pattern="M-*", **SIZES), seed=2).bfloat16(), folder / "plain")
    quantize_stage(QuantizeRecipe("int8"), folder / "plain", folder / "int8")
    return folder / "int8"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["quantize", "{int8}", "--to", "int4", "--out", "{out}"],
            "is a quantized checkpoint; it can be quantized no further",
        ),
        (["quantize", "{empty}", "--to", "int4", "--out", "{out}"], "config.json: no such file"),
        (["quantize", "{bare}", "--to", "int4", "--out", "{out}"], "are the weights missing?"),
        (["quantize", "{plain}", "--to", "int5", "--out", "{out}"], "invalid choice: 'int5'"),
        (
            ["quantize", "{plain}", "--to", "int4", "--out", "{out}", "--num-calibration-samples", "0"],
            "at least 1 document",
        ),
        (["quantize", "{plain}", "--to", "int4", "--out", "{out}", "--problems", "-1"], "problems is -1"),
        (
            ["quantize", "{plain}", "--to", "int4", "--out", "{out}", "--problems", "1"],
            "tokenizer.json: no such file",
        ),
        (
            ["quantize", "{plain}", "--to", "int4", "--out", "{out}", "--calibration", "{out}/none.jsonl"],
            "no such file or directory",
        ),
        (
            ["compress", "{int8}", "--out", "{out}"],
            "is a quantized checkpoint; use the checkpoint that it was made from",
        ),
        (
            ["prune", "{int8}", "--drop-layers", "1", "--out", "{out}"],
            "is a quantized checkpoint; use the checkpoint that it was made from",
        ),
        (
            ["align", "sft", "--model", "{int8}", "--shares.text", "0", "--out", "{out}"],
            "is a quantized checkpoint; use the checkpoint",
        ),
        (
            ["align", "grpo", "--model", "{int8}", "--out", "{out}"],
            "is a quantized checkpoint; use the checkpoint",
        ),
        (
            ["align", "merge", "--first", "{plain}", "--second", "{int8}", "--out", "{out}"],
            "is a quantized checkpoint; use the checkpoint",
        ),
        (
            ["distill", "{int8}", "{plain}", "--data", "{plain}", "--out", "{out}"],
            "is a quantized checkpoint; use the checkpoint",
        ),
        (
            ["generate", "{int8}", "--prompt", "x", "--quantize", "bf16"],
            "is a quantized checkpoint; it cannot be made bf16",
        ),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_command_refuses_in_one_line_and_writes_nothing(quantized, tmp_path, capsys, command, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((quantized.parent / "plain" / "config.json").read_text())
    places = {"int8": quantized, "plain": quantized.parent / "plain", "out": tmp_path / "out"}
    places |= {"empty": tmp_path / "empty", "bare": tmp_path / "bare"}
    assert main([part.format(**places) for part in command]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "empty"]


def test_importance_of_refuses_a_quantized_model_in_memory(quantized):
    from nanohybrid.prune.measure import importance_of

    with pytest.raises(InputError, match=r"the model is quantized \(int8\)"):
        importance_of(load(quantized), make_calibration(), quantized / "importance", True, 1)


@pytest.mark.parametrize("format", FORMATS)
def test_verify_passes_for_a_quantized_checkpoint(quantized, tmp_path, format, capsys):
    path = quantize_stage(QuantizeRecipe(format), quantized.parent / "plain", tmp_path / format)
    assert main(["verify", str(path), "--json", "--dtype", "fp32"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["passed"] and all(math.isfinite(check["difference"]) for check in told["checks"])


def test_verify_fails_where_a_code_is_not_read_back(quantized, monkeypatch):
    from nanohybrid.verify import checkpoint_check
    from nanohybrid.verify.model_under_test import ModelUnderTest

    def with_another_code(path, **options):
        model = load(path, **options)
        linear = model.backbone.layers[0].mixer.in_proj
        assert isinstance(linear, QuantizedLinear)
        linear.codes[0, 0] += 1
        return model

    assert checkpoint_check.saved_equals_loaded(ModelUnderTest(load(quantized))).passed
    monkeypatch.setattr(checkpoint_check, "load", with_another_code)
    assert not checkpoint_check.saved_equals_loaded(ModelUnderTest(load(quantized))).passed


@pytest.mark.parametrize("format", FORMATS)
def test_generate_quantize_equals_the_quantized_checkpoint(parent, tmp_path, format, capsys):
    stored = quantize_stage(QuantizeRecipe(format, quantize_head=True), parent, tmp_path / "stored")
    answers = []
    for command in ([str(parent), "--quantize", format], [str(stored)], [str(stored), "--quantize", format]):
        assert (
            main(
                [
                    "generate",
                    *command,
                    "--prompt",
                    "line 3 of",
                    "--max-new-tokens",
                    "8",
                    "--ignore-eos",
                    "--json",
                ]
            )
            == 0
        )
        answers.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert answers[0] == answers[1] == answers[2] and len(answers[0]) == 8


@pytest.mark.parametrize("format", FORMATS)
def test_random_model_is_quantized_as_it_is_made(format):
    from nanohybrid.engine.random_weights import random_model

    config = HybridConfig(pattern="M-*", **SIZES)
    want = random_model(config, torch.bfloat16, seed=3)
    quantize_model(want, format)
    same(random_model(config, torch.bfloat16, seed=3, quantize=format), want)
    with pytest.raises(InputError, match="known are"):
        random_model(config, torch.bfloat16, quantize="int3")
    assert format_in(want) == format
