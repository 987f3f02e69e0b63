"""Stages as CUDA graphs, without a GPU: only torch.cuda.graph itself has a stand-in, a tape.

The tape does what the rules of CUDA graphs say: what is captured is kept with the memory it was given, a
launch does the same in that memory and nothing else, and until then the results are garbage.
"""

from __future__ import annotations

import json

import factories
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lcm_compile import BuildSpec, build, load
from lcm_compile.bundles.bundle import open_bundle
from lcm_compile.engines import onnxruntime
from lcm_compile.engines.tensors import TensorRunner
from lcm_compile.pipeline import cuda_graphs
from lcm_compile.pipeline.cuda_graphs import FIRST, KINDS_KEPT, SWITCHED_OFF, USED
from lcm_compile.pipeline.drawing import eight_bits
from lcm_compile.pipeline.load import load_tokenizers
from lcm_compile.pipeline.pipeline import LcmPipeline
from lcm_compile.pipeline.request import Request
from lcm_compile.proof.parity import psnr_db
from lcm_compile.spec import ControlNetSpec, IpAdapterSpec, T2IAdapterSpec


class Tape(TorchDispatchMode):
    """Operations of torch and calls of engines, and the memory of what they gave."""

    on_device = None  # the tape that records or plays, if one does

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing: the host looks at a number")
        return self.call(lambda: function(*args, **(kwargs or {})))

    def call(self, function):
        result = function()
        self.done.append((function, result))
        return result

    def record(self, function):
        Tape.on_device = self
        with self:
            result = function()
        Tape.on_device = None
        with torch.inference_mode():
            for tensor in self.results():
                tensor.fill_(torch.nan if tensor.is_floating_point() else 77)
        return result

    def results(self):
        for _, result in self.done:
            yield from result.values() if isinstance(result, dict) else [result]

    def play(self):
        Tape.on_device = self
        with torch.inference_mode():
            for function, result in self.done:
                again = function()
                names = result if isinstance(result, dict) else ()
                for mine, new in [(result[n], again[n]) for n in names] or [(result, again)]:
                    mine.copy_(new)
        Tape.on_device = None


class TapeCapturer:
    """In place of engines.capture.Capturer, which test_capture.py tests."""

    def warm_up(self, function):
        return function()

    def capture(self, function):
        tape = Tape()
        result = tape.record(function)
        return tape.play, result


class Watched(TensorRunner):
    """An engine that can be captured, and tells which memory each of its calls on a tape had."""

    def __call__(self, inputs):
        def run():
            with _disable_current_modes():
                outputs = super(Watched, self).__call__(inputs)
            if Tape.on_device:
                given = {spec.name: inputs[spec.name].data_ptr() for spec in self.contract.inputs}
                written = {name: array.data_ptr() for name, array in outputs.items() if self.stays}
                self.calls.append((given, written))
            return outputs

        return Tape.on_device.call(run) if Tape.on_device else run()

    def cannot_capture(self):
        return None

    def to_host(self, array):
        assert Tape.on_device is None, "the host looks while the device draws"
        return super().to_host(array)


class Fixed(Watched, onnxruntime.BoundRunner):
    """Its outputs stay where they are, as those of a TensorRT engine do."""

    stays = True

    def __init__(self, path, contract):
        session = onnxruntime.open_checked(path, contract, [onnxruntime.CPU])
        super().__init__(session, contract, "cpu")
        self.calls = []


class ScriptRunner(TensorRunner):
    def __call__(self, inputs):
        with torch.inference_mode():
            outputs = self.module(*(self.tensor(spec, inputs[spec.name]) for spec in self.contract.inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {spec.name: array for spec, array in zip(self.contract.outputs, outputs, strict=True)}

    def close(self):
        self.module = None


class Fresh(Watched, ScriptRunner):
    """Its outputs are new arrays at each call, as those of AOTInductor are; the tape puts them in place."""

    stays = False

    def __init__(self, path, contract):
        super().__init__(contract, "cpu")
        self.module, self.calls = torch.jit.load(str(path)), []


class InPlace(ScriptRunner):
    """Writes the outputs of each call over those of the one before."""

    def __call__(self, inputs):
        outputs = super().__call__(inputs)
        with torch.inference_mode():
            return {name: self.memory.setdefault(name, array).copy_(array) for name, array in outputs.items()}


class FixedScript(Watched, InPlace):
    """As Fixed, of a TorchScript bundle."""

    stays = True

    def __init__(self, path, contract):
        super().__init__(contract, "cpu")
        self.module, self.calls, self.memory = torch.jit.load(str(path)), [], {}

    @property
    def exclusive(self):
        return True


class OwnGraphs(onnxruntime.BoundRunner):
    """A session that captures itself, as one opened for it does on a GPU; it tells what is bound."""

    def __init__(self, path, contract):
        session = onnxruntime.open_checked(path, contract, [onnxruntime.CPU])
        super().__init__(session, contract, "cpu", cannot_graph="")
        self.bound, binding = [], self._binding

        class Binding:
            def __getattr__(_, name):
                return getattr(binding, name)

            def bind_input(_, name, *where):
                self.bound.append((name, where[-1]))
                binding.bind_input(name, *where)

        self._binding = Binding()


def pipeline_of(folder, engine, **options):
    """The pipeline of a bundle, with engines of a class above."""
    bundle = open_bundle(folder)
    runners = {s.contract.name: engine(bundle.path(s.file), s.contract) for s in bundle.manifest.stages}
    settings = bundle.manifest.pipeline
    return LcmPipeline(settings, runners, load_tokenizers(bundle.folder, settings), **options)


@pytest.fixture
def tape(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "Capturer", TapeCapturer)


@pytest.fixture(scope="module")
def full_lcm(tmp_path_factory):
    """SD1.5's architecture with a guidance embedding, two pictures at a time, without a context stage."""
    folder = tmp_path_factory.mktemp("full")
    base = factories.write_sd15(folder / "base", factor=4, time_cond_proj_dim=16)
    without = ("context", "lcm-step")
    spec = BuildSpec(base=str(base), batch=2, height=48, width=64, backend="torchscript", without=without)
    return build(spec, folder / "bundle").folder


STAR, RING = "a large red star on white", "a small blue circle"
GUIDED = {"guidance_scale": 1.5}
REQUESTS = {
    "guided by a second pass": [
        Request(STAR, 7),
        Request(STAR, 7, **GUIDED),
        Request(STAR, 8, steps=6),  # more than one call of the context
        Request(RING, 9, num_images=2),
        Request(RING, 1, "a star", **GUIDED),
        Request(STAR, 7, steps=6),
        Request(STAR, 2, "", guidance_scale=2.0, num_images=2),
        Request(STAR, 10, steps=1),
        Request(RING, 11, steps=1),
        Request(STAR, 7),
    ],
    "guidance as an input": [
        Request(STAR, 7),
        Request(RING, 7, **GUIDED),
        Request(STAR, 8, guidance_scale=8.0, num_images=3),
        Request(STAR, 9),
    ],
}
KINDS = [("guided by a second pass", Fixed), ("guidance as an input", Fresh)]


def folder_for(case, request):
    return request.getfixturevalue("sdxl_bundle" if case == "guided by a second pass" else "full_lcm")


@pytest.mark.parametrize(("case", "engine"), KINDS)
def test_pictures_are_those_drawn_without(case, engine, tape, request):
    folder = folder_for(case, request)
    plain = pipeline_of(folder, engine, cuda_graph=False)
    pipeline = pipeline_of(folder, engine, prompt_cache=2)  # so that prompts are known, forgotten, and new
    seen = set()
    for asked in REQUESTS[case]:
        drawing, expected = pipeline.draw(asked), plain.draw(asked)
        np.testing.assert_array_equal(drawing.pictures, expected.pictures, str(asked))
        kind = asked.steps, asked.guidance_scale > 1 and case == "guided by a second pass"
        assert (drawing.cuda_graph, expected.cuda_graph) == (USED if kind in seen else FIRST, SWITCHED_OFF)
        assert drawing.ms.keys() == expected.ms.keys()
        assert len(drawing.ms["step"]) == len(expected.ms["step"])
        seen.add(kind)


@pytest.fixture(scope="module", params=[False, True], ids=["any model", "inpainting"])
def reads_pictures(request, tmp_path_factory):
    """A bundle that begins at pictures, and whether its model is told what it repaints."""
    folder = tmp_path_factory.mktemp("reads")
    base = factories.write_sdxl(folder / "base", in_channels=9 if request.param else 4, out_channels=4)
    spec = BuildSpec(str(base), no_lcm=True, few_step="lcm", backend="torchscript", image=True)
    return build(spec, folder / "bundle").folder, request.param


@pytest.mark.parametrize("engine", [FixedScript, Fresh])
def test_pictures_that_begin_at_a_picture(engine, tape, reads_pictures):
    folder, inpainting = reads_pictures
    plain, pipeline = pipeline_of(folder, engine, cuda_graph=False), pipeline_of(folder, engine)
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    half = Image.fromarray(np.tile(np.asarray([0, 255], np.uint8).repeat(32), (64, 1)))
    for how in ({}, GUIDED, {"sampler": "dpm++2m", "steps": 6}):
        masks = half.rotate(90) if inpainting else None, half, half.rotate(180), half
        for i, mask in enumerate(masks):
            asked = Request(STAR, i, "", image=noise, strength=0.5, mask=mask, **how)
            drawing, expected = pipeline.draw(asked), plain.draw(asked)
            np.testing.assert_array_equal(drawing.pictures, expected.pictures, str(asked))
            assert drawing.cuda_graph == (USED if i else FIRST)
    if not inpainting:  # two passes, of one size here
        for one in (plain, pipeline):
            one._open_larger = lambda request: pipeline_of(folder, engine)
        for i, upscaler in enumerate(("latent", "latent", "lanczos")):
            asked = Request(STAR, i, hires=2, hires_upscaler=upscaler)
            drawing, expected = pipeline.draw(asked), plain.draw(asked)
            np.testing.assert_array_equal(drawing.pictures, expected.pictures, str(asked))
            assert (drawing.cuda_graph == USED) == (i > 0)
            assert expected.cuda_graph == SWITCHED_OFF


@pytest.mark.parametrize(("case", "engine"), KINDS)
def test_prompts_that_share_a_drawing(case, engine, tape, request):
    folder = folder_for(case, request)
    plain = pipeline_of(folder, engine, cuda_graph=False)
    pipeline = pipeline_of(folder, engine, prompt_cache=0)
    texts = [(STAR, RING), (RING, STAR), (RING, STAR), ("two stars", "")]
    requests = [Request(text, seed, other, **GUIDED) for seed, (text, other) in enumerate(texts)]
    for asked in (requests[:1], requests, requests[::-1]):
        drawing, expected = pipeline.draw(asked), plain.draw(asked)
        np.testing.assert_array_equal(drawing.pictures, expected.pictures)
        assert drawing.cuda_graph == (FIRST if asked == requests[:1] else USED)


@pytest.fixture(scope="module")
def controlled(tmp_path_factory):
    """SD1.5's architecture with two ControlNets, a T2I-Adapter and an IP-Adapter."""
    folder = tmp_path_factory.mktemp("controlled")
    base = factories.write_sd15(folder / "base")
    nets = [factories.write_controlnet(base, folder / f"net-{seed}", seed) for seed in (3, 4)]
    factories.write_image_encoder(folder / "ip/image_encoder")
    guides = {
        "controlnets": tuple(ControlNetSpec(str(net)) for net in nets),
        "t2i_adapters": (T2IAdapterSpec(str(factories.write_t2i_adapter(folder / "adapter"))),),
        "ip_adapter": IpAdapterSpec(str(factories.write_ip_adapter(base, folder / "ip/adapter.safetensors"))),
    }
    spec = BuildSpec(str(base), no_lcm=True, few_step="lcm", backend="torchscript", **guides)
    return build(spec, folder / "bundle").folder


@pytest.mark.parametrize("engine", [Fresh, FixedScript])
def test_controlnets_and_adapters(engine, tape, controlled):
    plain = pipeline_of(controlled, engine, cuda_graph=False)
    pipeline = pipeline_of(controlled, engine)
    pictures = [np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8) for seed in (1, 2, 3)]
    photo = factories.painting()
    seen = set()
    for options, kind in (
        ({}, "all"),
        ({"ip_image": photo}, "all"),
        ({"ip_image": photo.rotate(90), "ip_weight": 0.4}, "all"),
        ({"control_weight": [0.5, 1.5, 0.7], "seed": 8}, "all"),
        ({"control": pictures[::-1]}, "all"),
        ({"control_end": [0.5, 1.0, 0.75]}, "some end"),
        (GUIDED, "guided"),
        ({"control_weight": 0}, "none"),
        (GUIDED | {"control": pictures[::-1], "control_weight": -0.3, "negative_prompt": RING}, "guided"),
        (GUIDED | {"ip_image": photo}, "guided"),
        ({"control_end": [0.5, 1.0, 0.75], "control_weight": [0.2, 0.9, 0.4]}, "some end"),
        ({"control_weight": 0, "seed": 9}, "none"),
        ({}, "all"),
    ):
        asked = Request(**{"prompt": STAR, "seed": 7, "control": pictures, **options})
        drawing, expected = pipeline.draw(asked), plain.draw(asked)
        np.testing.assert_array_equal(drawing.pictures, expected.pictures, str(options))
        assert drawing.cuda_graph == (USED if kind in seen else FIRST)
        seen.add(kind)


@pytest.mark.parametrize(("case", "engine"), KINDS)
def test_every_launch_has_the_same_memory(case, engine, tape, request):
    """Also the text encoders', whatever the prompt."""
    pipeline = pipeline_of(folder_for(case, request), engine, prompt_cache=0)
    for seed in range(2):
        pipeline.draw(Request(STAR, seed))
    for runner in pipeline.runners.values():
        runner.calls.clear()
    counts = []
    for seed, prompt in enumerate([STAR, RING, STAR]):
        assert pipeline.draw(Request(prompt, seed)).cuda_graph == USED
        counts.append([len(runner.calls) for runner in pipeline.runners.values()])
    assert counts == [[n * i for n in counts[0]] for i in (1, 2, 3)]
    assert counts[0][0] == 1 and counts[0][-2:] == [4, 1]  # encode, step, decode
    for runner in pipeline.runners.values():
        a_picture = len(runner.calls) // 3
        assert runner.calls[:a_picture] == runner.calls[a_picture : 2 * a_picture]
        assert runner.calls[:a_picture] == runner.calls[2 * a_picture :]


def test_steps_read_what_the_context_wrote_where_it_lies(tape, sdxl_bundle):
    pipeline = pipeline_of(sdxl_bundle, Fixed)
    for seed in range(2):
        pipeline.draw(Request(STAR, seed))
    [(_, written)] = pipeline.runners["context"].calls[-1:]
    keys_values = {name: address for name, address in written.items() if name.startswith("keys_values")}
    assert keys_values
    for given, _ in pipeline.runners["step"].calls[-4:]:
        assert keys_values.items() <= given.items()


def test_the_picture_is_that_of_diffusers(tape, sdxl_checkpoint, sdxl_bundle):
    theirs = DiffusionPipeline.from_pretrained(sdxl_checkpoint)
    theirs.scheduler = LCMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    pipeline = pipeline_of(sdxl_bundle, Fixed)
    for prompt, seed, guidance in ((STAR, 1, 1.0), (RING, 2, 1.0), (STAR, 3, 1.5), (RING, 4, 1.5)):
        drawing = pipeline.draw(Request(prompt, seed, guidance_scale=guidance))
        expected = theirs(
            prompt,
            num_inference_steps=4,
            guidance_scale=guidance,
            generator=torch.Generator("cpu").manual_seed(seed),
            height=64,
            width=64,
            output_type="np",
        ).images
        assert psnr_db(eight_bits(expected), drawing.pictures) >= 65
        assert drawing.cuda_graph == (FIRST if prompt == STAR else USED)


def test_progress_is_reported_as_without(tape, sdxl_bundle):
    asked, told = Request(STAR, 7, guidance_scale=1.5, num_images=2), []
    pipeline = pipeline_of(sdxl_bundle, Fixed)
    for _ in range(2):
        told.append([])
        pipeline.draw(asked, lambda done, total: told[-1].append((done, total)))
    assert told[0] == told[1] and told[0][-1] == (22, 22)


def fails(message, monkeypatch):
    tried = []

    def capture(self, function):
        tried.append(function)
        raise RuntimeError(message)

    monkeypatch.setattr(TapeCapturer, "capture", capture)
    return tried


def test_where_it_can_not_be_captured_pictures_are_drawn_without_and_why_is_told(
    tape, monkeypatch, sdxl_bundle
):
    tried = fails("CUDA error: operation not permitted\nCompile with", monkeypatch)
    pipeline, plain = pipeline_of(sdxl_bundle, Fixed), pipeline_of(sdxl_bundle, Fixed, cuda_graph=False)
    told = []
    for seed in range(4):
        drawing = pipeline.draw(Request(STAR, seed))
        np.testing.assert_array_equal(drawing.pictures, plain.draw(Request(STAR, seed)).pictures)
        told.append(drawing.cuda_graph)
    assert told == [FIRST, *["not used: RuntimeError: CUDA error: operation not permitted"] * 3]
    assert len(tried) == 1  # it is not tried again


@pytest.mark.parametrize(
    ("kept", "told_of"), [("picture", "of encode"), ("hidden_states", "another picture")]
)
def test_graphs_that_draw_another_picture_are_not_used(tape, monkeypatch, sdxl_bundle, kept, told_of):
    """As where an engine enqueued on a stream that was not captured: only one stage's calls are kept."""
    record = Tape.record

    def forgets(self, function):
        result = record(self, function)
        self.done = [done for done in self.done if not isinstance(done[1], dict) or kept in done[1]]
        return result

    monkeypatch.setattr(Tape, "record", forgets)
    pipeline, plain = pipeline_of(sdxl_bundle, Fixed), pipeline_of(sdxl_bundle, Fixed, cuda_graph=False)
    told = []
    for seed in range(3):
        drawing = pipeline.draw(Request(STAR, seed))
        np.testing.assert_array_equal(drawing.pictures, plain.draw(Request(STAR, seed)).pictures)
        told.append(drawing.cuda_graph)
    assert told[0] == FIRST and all(told_of in reason for reason in told[1:])


def test_it_can_be_switched_between_pictures(tape, sdxl_bundle):
    pipeline, told = pipeline_of(sdxl_bundle, Fixed), []
    for on in (True, True, False, True):
        pipeline.cuda_graph = on
        told.append(pipeline.draw(Request(STAR, 7)).cuda_graph)
    assert told == [FIRST, USED, SWITCHED_OFF, USED]


def test_graphs_of_kinds_long_not_drawn_are_dropped(tape, sdxl_bundle):
    pipeline = pipeline_of(sdxl_bundle, Fixed)
    kinds = [2] * 2 + list(range(3, 3 + KINDS_KEPT)) + [2] * 2
    told = [pipeline.draw(Request(STAR, 7, steps=steps)).cuda_graph for steps in kinds]
    assert told == [FIRST, USED, *[FIRST] * KINDS_KEPT, FIRST, USED]


def test_an_engine_with_graphs_of_its_own_reads_the_same_memory_while_it_uses_them(sdxl_bundle):
    pipeline, plain = (
        pipeline_of(sdxl_bundle, OwnGraphs),
        pipeline_of(sdxl_bundle, OwnGraphs, cuda_graph=False),
    )
    step, told, bound = pipeline.runners["step"], [], []
    # Arrays that stay, so that no two pictures happen to be given the same memory.
    held = []
    step.to_device = lambda array: held.append(torch.from_numpy(array.copy())) or held[-1]
    for seed, on in enumerate((True, True, True, False, True)):
        step.bound.clear()
        pipeline.cuda_graph = on
        drawing = pipeline.draw(Request(STAR, seed, num_images=2))
        np.testing.assert_array_equal(
            drawing.pictures, plain.draw(Request(STAR, seed, num_images=2)).pictures
        )
        told.append(drawing.cuda_graph)
        bound.append(set(step.bound))
    assert told == [FIRST, USED, USED, SWITCHED_OFF, USED]
    # The second picture's includes what it is tried with, before it is used.
    assert bound[1] > bound[2] == bound[4] and len(bound[2]) == len(step.contract.inputs)
    assert len(bound[0]) > len(bound[2]) < len(bound[3])


def test_an_engine_that_refuses_graphs_of_its_own_says_why(sdxl_bundle):
    def refuses(path, contract):
        session = onnxruntime.open_checked(path, contract, [onnxruntime.CPU])
        runner = onnxruntime.BoundRunner(session, contract, "cpu", cannot_graph="a node is on the CPU")
        runner.cannot_capture = lambda: "it can't be captured from outside"
        return runner

    pipeline = pipeline_of(sdxl_bundle, refuses)
    told = {pipeline.draw(Request(STAR, seed)).cuda_graph for seed in range(3)}
    assert told == {"not used: a node is on the CPU"}


@pytest.mark.parametrize("fault", ["raises", "computes nothing"])
def test_own_graphs_that_do_not_work_are_not_used(fault, sdxl_bundle):
    def faulty(path, contract):
        runner = OwnGraphs(path, contract)
        runner.cannot_capture = lambda: "it can't be captured from outside"
        session = runner._session

        class Session:
            def run_with_iobinding(self, binding, options):
                if not runner._graphed:
                    session.run_with_iobinding(binding, options)
                elif fault == "raises":
                    raise RuntimeError("CUDA failure 900: operation not permitted\nmore")

        runner._session = Session()
        return runner

    pipeline, plain = pipeline_of(sdxl_bundle, faulty), pipeline_of(sdxl_bundle, OwnGraphs)
    for seed in range(3):
        drawing = pipeline.draw(Request(STAR, seed))
        np.testing.assert_array_equal(drawing.pictures, plain.draw(Request(STAR, seed)).pictures)
    assert ("CUDA failure 900" if fault == "raises" else "something else") in drawing.cuda_graph
    assert "more" not in drawing.cuda_graph


def test_on_a_processor_there_is_none(sdxl_bundle, command, tmp_path):
    with load(sdxl_bundle) as pipeline:
        told = {pipeline.draw(Request(STAR, seed)).cuda_graph for seed in range(2)}
        assert told == {"not used: it computes on the processor"}
    with load(sdxl_bundle, cuda_graph=False, wait=False) as pipeline:
        assert pipeline.draw(Request(STAR, 7)).cuda_graph == SWITCHED_OFF
    code, out, _ = command("run", STAR, "--engine", sdxl_bundle, "--out", tmp_path / "a.png", "--json")
    assert code == 0 and json.loads(out)["cuda_graph"] == "not used: it computes on the processor"
