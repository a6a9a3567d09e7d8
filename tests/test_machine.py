"""How networks and data are run changes nothing that is computed: precision, parts, cache."""
import contextlib
import errno
import io
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import launch, write_pictures


@pytest.fixture(autouse=True)
def restored(stage, monkeypatch):
    """Whatever a test sets in Machine or for signals is as before when it ends."""
    for name in ("bf16", "compiled", "micro_batch", "fetch_every", "memory"):
        monkeypatch.setattr(stage(1).Machine, name, getattr(stage(1).Machine, name))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    stage(1).Progress.running, stage(1).Progress.stop = False, 0
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start(stage, tmp_path, main, *flags, number=1):
    """Launch `main` with the options of a stage."""
    args = stage(number).parse_args(["--smoke", "--out", str(tmp_path), *flags])
    return stage(1).launch(main, args)


def small_net(stage, seed=0):
    torch.manual_seed(seed)
    net = stage(1).DiT(16, 4, 16, 1, 8)
    for p in net.parameters():                             # the zeros of the start let nothing out
        torch.nn.init.normal_(p, std=0.1)
    return net


# ---- precision -------------------------------------------------------------------------------
def test_bf16_is_of_the_forward_passes_alone(stage):
    """Loss and drawing change a little and stay float32; so do parameters and gradients."""
    net, pairs = small_net(stage), stage(1).draw_toy(32, 16, 0, "val")
    x, c = pairs.batch(range(32))
    t, eps = stage(1).draw_noise(x, stage(1).seeded("cpu", 1))
    found = []
    for stage(1).Machine.bf16 in (False, True):
        net.zero_grad()
        L = stage(1).flow_loss(net, x, c, t, eps)
        L.sum().backward()
        assert {L.dtype} | {p.grad.dtype for p in net.parameters()} == {torch.float32}
        assert stage(1).velocity(net, x, t, c).dtype == torch.float32
        found.append((L.detach(), stage(1).sample(net, c, eps, 2)))
    for whole, half in zip(*found):
        assert half.dtype == torch.float32 and not torch.equal(whole, half)
        assert (whole - half).abs().max() < 0.03 * whole.abs().max()


@pytest.mark.parametrize("flag,cuda,bf16,tf32", [
    ("auto", False, False, None), ("bf16", False, True, None), ("auto", "new", True, "high"),
    ("auto", "old", False, "high"), ("tf32", "new", False, "high"),
    ("fp32", "new", False, "highest")])
def test_precision_on_each_machine(stage, tmp_path, monkeypatch, flag, cuda, bf16, tf32):
    """bf16 by itself on a GPU that has it; TF32 for the other products, convolutions too, unless
    fp32 is asked for. What `auto` came to is what a continued run has to have. The group is made with both backends, after the device is chosen (its GPU is made up here)."""
    said, seen, made = [], [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: cuda == "new")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda k: made.append(f"device {k}"))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    monkeypatch.setattr(stage(1).dist, "init_process_group", lambda name: made.append(name))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"),
                        ("MASTER_PORT", "1"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    start(stage, tmp_path, lambda args, device: seen.append(
        (device.type, stage(1).Machine.bf16, stage(1).Machine.fetch_every, args.precision)),
        "--precision", flag)
    resolved = flag if flag != "auto" else "bf16" if bf16 else "tf32" if cuda else "fp32"
    assert seen == [("cuda" if cuda else "cpu", bf16, 10 if cuda else 1, resolved)]
    assert said == ([tf32] if cuda else [])
    assert torch.backends.cudnn.allow_tf32 == (flag != "fp32")
    assert made == (["device 3", "cpu:gloo,cuda:nccl"] if cuda else ["gloo"])


def test_more_processes_than_gpus_are_one_line(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match=r"1 GPU\(s\) here: --nproc-per-node"):
        start(stage, tmp_path, lambda args, device: None)


def test_compiled_blocks_keep_their_names_and_share_one_graph(stage, monkeypatch):
    """Two networks of one shape are traced once, and give what they give uncompiled."""
    settings = stage(1).parse_args(["--width", "16", "--depth", "2"])
    plain = stage(1).build_proxy(settings, "cpu")
    compile_block = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda block: compile_block(block, backend="eager"))
    stage(1).Machine.compiled, traced = True, torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    x, c, t = torch.randn(4, 3, 16, 16), torch.ones(4, 8).long(), torch.rand(4)
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.1)
    before, graphs = traced["unique_graphs"], []
    for _ in range(2):
        net = stage(1).build_proxy(settings, "cpu")
        assert net.state_dict().keys() == plain.state_dict().keys()
        net.load_state_dict(plain.state_dict())
        assert torch.allclose(net(x, t, c), plain(x, t, c), atol=1e-6)
        graphs.append(traced["unique_graphs"] - before)
    assert graphs[0] == graphs[1] > 0


# ---- memory ----------------------------------------------------------------------------------
@pytest.mark.parametrize("micro", [5, 16, 100])
def test_micro_batches_add_up_to_the_same_step(stage, monkeypatch, micro):
    """01 and 02 to 1e-5, and never more pairs in a pass than asked for."""
    pairs, val = (stage(1).draw_toy(32, 16, 0, split) for split in ("train", "val"))
    args = stage(2).parse_args(["--group-size", "8"])
    flow_loss, sizes, found = stage(1).flow_loss, [], []

    def watched(net, x, *rest):
        sizes.append(len(x))
        return flow_loss(net, x, *rest)
    monkeypatch.setattr(stage(1), "flow_loss", watched)
    for stage(1).Machine.micro_batch in (None, micro):
        net, sizes[:] = small_net(stage), []
        stage(1).train(net, pairs, 3, 16, 1e-3, 0)
        torch.manual_seed(0)
        nets = {"proxy": small_net(stage, 1), "ref": small_net(stage, 2),
                "rater": stage(2).Rater(16, 4, 8, 16, 1)}
        opts = {name: torch.optim.SGD(one.parameters(), 0.1) for name, one in nets.items()}
        numbers = stage(2).meta_step(nets, opts, pairs.batch(range(16)), val.batch(range(16)),
                                     stage(1).seeded("cpu", 0), args)
        found.append([numbers, *(p.detach() for one in (net, *nets.values())
                                 for p in one.parameters())])
    assert max(sizes) <= micro and sum(sizes) == 3 * 16 + 16 + 32
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found))


def test_theta_hat_is_done_before_theta_begins(stage, monkeypatch):
    """At no time do two proxies keep what their backward passes need."""
    events, nets = [], {"proxy": small_net(stage), "ref": small_net(stage, 1),
                        "rater": stage(2).Rater(16, 4, 8, 16, 1)}
    names = {id(net): name for name, net in nets.items()}
    for function in ("flow_loss", "step_down"):
        def watched(net, *rest, inner=getattr(stage(1), function), function=function):
            events.append((names[id(net)], function))
            return inner(net, *rest)
        monkeypatch.setattr(stage(1), function, watched)
    opts = {name: torch.optim.SGD(net.parameters(), 0.1) for name, net in nets.items()}
    batches = (stage(1).draw_toy(16, 16, 0, split).batch(range(16)) for split in ("train", "val"))
    stage(2).meta_step(nets, opts, *batches, stage(1).seeded("cpu", 0),
                       stage(2).parse_args(["--group-size", "8"]))
    assert events == [(name, function) for name in ("ref", "proxy")
                      for function in ("flow_loss", "step_down")] + [("rater", "step_down")]


@pytest.mark.parametrize("greedy", [lambda: torch.empty(10 ** 15), lambda: np.empty(10 ** 15)])
def test_too_little_memory_is_one_line_with_both_options(stage, tmp_path, greedy):
    with pytest.raises(SystemExit, match="^out of memory: .*--micro-batch.*--batch-size.*$"):
        start(stage, tmp_path, lambda args, device: greedy())


def test_the_cure_names_options_that_the_stage_has(stage, monkeypatch, tmp_path):
    def greedy(args, device):
        raise MemoryError("unable to allocate")
    args = stage(3).parse_args(["--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="^out of memory: lower --memory$"):
        stage(1).launch(greedy, args)


def test_other_errors_keep_their_traceback(stage, tmp_path):
    def main(args, device):
        raise RuntimeError("an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"):
        start(stage, tmp_path, main)


def test_05_looks_at_a_part_of_the_pairs_at_a_time(stage, monkeypatch):
    """Held-out loss, drawing and judging give what they give in one piece."""
    test, sizes = stage(1).draw_toy(40, 16, 0, "test"), []
    net, judge = small_net(stage), stage(3).Contrast(16, 8)
    reference = stage(5).moments(judge.embed_images(test.batch(range(40))[0])[0].detach())
    net.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    judge.image.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    found = []
    for part in (16, 100):
        monkeypatch.setattr(stage(5), "PART", part)
        sizes.clear()
        found.append(stage(5).evaluate(net, test, judge, reference, 0))
        assert max(sizes) <= 2 * part                      # sampling asks with and without caption
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)


# ---- numbers stay on the device --------------------------------------------------------------
def test_numbers_are_fetched_every_ten_steps_and_before_saves(stage, tmp_path):
    stage(1).Machine.fetch_every = 10
    progress, known = stage(1).Progress(tmp_path / "p.progress", "01_proxy.py", {}, 1e9), []
    progress.attach()
    for k in range(25):
        progress.advance(torch.tensor([float(k)]), after=lambda step: known.append(
            len(progress.log)))
    assert known == [0] * 9 + [10] * 10 + [20] * 6
    progress.save_every = 0
    progress.advance(torch.tensor([25.0]))
    saved = stage(1).load(tmp_path / "p.progress", "01_proxy.py")
    assert saved["step"] == len(saved["log"]) == 26
    progress.save_every = 1e9
    progress.advance(torch.tensor([26.0]))
    assert [row for row, in progress.fetch()] == list(range(27))


@pytest.mark.parametrize("save_every,seen", [(0, 6), (1e9, 10)])
def test_nan_found_late_names_its_own_step_and_pairs(stage, tmp_path, save_every, seen):
    """It came in step 7; it is found before the next save, and at step 10 at the latest."""
    stage(1).Machine.fetch_every = 10
    progress = stage(1).Progress(tmp_path / "p.progress", "01_proxy.py", {}, save_every)
    progress.attach()
    done = []
    with pytest.raises(SystemExit, match="step 7: .*nan.* pairs of its batch: pair of step 7$"):
        for k in range(1, 20):
            progress.advance(torch.tensor([1.0 if k < 7 else float("nan")]),
                             [f"pair of step {k}"], lambda step: done.append(0))
    assert len(done) == max(seen, 6) - (seen > 6)
    if not save_every:
        saved = stage(1).load(tmp_path / "p.progress", "01_proxy.py")
        assert saved["step"] == len(saved["log"]) == 6


def test_the_last_steps_are_looked_at_too(stage):
    """Training of seven steps ends with seven finite numbers, or with the line that names one."""
    stage(1).Machine.fetch_every, pairs = 10, stage(1).draw_toy(16, 16, 0, "val")
    progress = stage(1).Progress()
    stage(1).train(small_net(stage), pairs, 7, 8, 1e-3, 0, progress=progress)
    assert len(progress.log) == 7
    broken = small_net(stage)
    broken.position.data[0, 0, 0] = float("inf")
    with pytest.raises(SystemExit, match="step 1: .*val0000"):
        stage(1).train(broken, pairs, 3, 8, 1e-3, 0)


def test_one_process_stops_at_once_all_the_same(stage, tmp_path):
    stage(1).Machine.fetch_every = 10
    progress = stage(1).Progress(tmp_path / "p.progress", "01_proxy.py", {}, 1e9)
    progress.attach()
    progress.advance(torch.tensor([1.0]))
    stage(1).Progress.stop = signal.SIGTERM
    with pytest.raises(SystemExit) as stop:
        progress.advance(torch.tensor([1.0]))
    assert stop.value.code == 128 + 15
    assert stage(1).load(tmp_path / "p.progress", "01_proxy.py")["step"] == 2


# ---- data ------------------------------------------------------------------------------------
@pytest.fixture()
def shards(stage, tmp_path):
    """60 pairs of a folder, one of them broken, on disk."""
    write_pictures(stage, tmp_path / "pictures", 60)
    next((tmp_path / "pictures").glob("*07.png")).write_bytes(b"no picture")
    return stage(1).open_pairs(tmp_path / "pictures", 16, 8)


def count_decoding(stage, monkeypatch):
    decoded, decode = [], stage(1).decode

    def counted(data, size):
        decoded.append(data)
        return decode(data, size)
    monkeypatch.setattr(stage(1), "decode", counted)
    return decoded


def test_pictures_are_decoded_once_and_read_as_before(stage, shards, tmp_path, monkeypatch,
                                                      capsys):
    """Three epochs and a selection; pixels, tokens, keys and captions are those of the files."""
    batches = np.random.default_rng(0).permutation(60).reshape(6, 10)
    expected = {tuple(rows): part for rows, part in shards.parts(iter(batches))}
    kept, decoded = stage(1).keep_decoded(shards, tmp_path), count_decoding(stage, monkeypatch)
    assert "60 pairs exceed --memory: decoded once, with 0.0 GB" in capsys.readouterr().out
    assert not list(tmp_path.glob(".pixels*"))             # free again, however the run ends
    for _ in range(3):
        for rows, part in kept.parts(iter(batches)):
            same = expected[tuple(rows)]
            assert torch.equal(part.images, same.images) and torch.equal(part.tokens, same.tokens)
            assert (part.keys, part.captions) == (same.keys, same.captions)
    assert sum(data != b"no picture" for data in decoded) == 59
    chosen = stage(1).keep_resident(kept.take(batches[2]).to("cpu"))
    same = expected[tuple(batches[2])]
    assert torch.equal(chosen.images, same.images) and chosen.keys == same.keys
    assert sum(data != b"no picture" for data in decoded) == 59


def test_a_full_disk_is_said_and_costs_time_alone(stage, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage(1).shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    assert stage(1).keep_decoded(shards, tmp_path) is shards
    assert "decoded in every epoch" in capsys.readouterr().out


def test_memory_is_an_option(stage, tmp_path, monkeypatch):
    """Stage 1 on a folder: kept in memory, or, at --memory 0, decoded once and cached."""
    write_pictures(stage, tmp_path / "pictures", 60)
    kinds, train, found = [], stage(1).train, []

    def watched(net, pairs, *rest, **more):
        kinds.append(type(pairs).__name__)
        return train(net, pairs, *rest, **more)
    monkeypatch.setattr(stage(1), "train", watched)
    places = ["--data", str(tmp_path / "pictures"), "--val", str(tmp_path / "pictures")]
    for memory in ("1", "0"):
        out = tmp_path / f"out{memory}"
        launch(stage, 1, [*places, "--smoke", "--out", str(out), "--memory", memory])
        found.append((out / "proxy.csv").read_text())
    assert kinds == ["Pairs", "Shards"] and found[0] == found[1]
    launch(stage, 1, [*places, "--smoke", "--out", str(out)])
    assert kinds[-1] == "Pairs"                            # 2 GB without the option


def test_an_arm_that_fits_is_kept_in_memory(stage, shards, tmp_path, monkeypatch):
    """05 at a memory of 30 pictures: the corpus on disk, half of it resident."""
    kinds = []
    monkeypatch.setattr(stage(1).Machine, "memory", 30 * 3 * 16 ** 2)
    monkeypatch.setattr(stage(1), "train", lambda net, pairs, *rest, **more: kinds.append(
        (type(pairs).__name__, len(pairs))))
    monkeypatch.setattr(stage(5), "evaluate", lambda *rest: ({}, None))
    settings, args = stage(1).parse_args([]), stage(5).parse_args(["--batch-size", "8"])
    for arm in stage(5).ARMS[:2]:               # all pairs, and a random half
        stage(5).run_arm(arm, 0, args, settings, shards, None, None, None, stage(1).Progress())
    assert kinds[0] == ("Shards", 60) and kinds[1][0] == "Pairs" and 29 <= kinds[1][1] <= 30


def test_no_worker_is_started_for_a_single_batch(stage, shards, monkeypatch):
    def refuse(*args, **more):
        raise AssertionError("a DataLoader for one batch")
    many = shards.take(np.arange(1200) % 60)
    monkeypatch.setattr(stage(1), "DataLoader", refuse)
    (_, part), = many.parts([np.arange(5)])
    assert part.keys == many.name(range(5))
    with pytest.raises(AssertionError):
        next(many.parts(iter([np.arange(5)])))


@pytest.mark.parametrize("allowed,processes,workers", [(6, 1, 6), (6, 2, 3), (1, 4, 1),
                                                       (40, 1, 40)])
def test_workers_follow_the_cores_that_may_be_used(stage, shards, monkeypatch, allowed, processes,
                                                   workers):
    seen = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(stage(1), "DataLoader", lambda *_, num_workers, **more: seen.append(
        num_workers) or [])
    list(shards.take(np.arange(1200) % 60).parts(iter([])))
    assert seen == [workers]


@pytest.mark.parametrize("size", [(640, 480), (300, 1000), (40, 40), (31, 900)])
def test_a_large_jpeg_is_decoded_at_reduced_scale(stage, size):
    """To a few grey levels the same picture, from fewer pixels where there are many."""
    waves = np.add.outer(np.arange(size[1]) / size[1], np.arange(size[0]) / size[0])
    file = io.BytesIO()
    Image.fromarray((60 * np.stack([waves, 2 - waves, waves], 2) + 60).astype("u1")).save(
        file, "JPEG", quality=95)
    whole, scaled = (stage(1).open_image(file.getvalue(), side) for side in (None, 16))
    assert whole.size == size
    assert min(scaled.size) >= min(32, min(size))
    assert (scaled.size != size) == (min(size) >= 64)
    assert abs(stage(1).decode(file.getvalue(), 16).astype(int)
               - np.asarray(stage(1).image_ops.resize(stage(1).image_ops.center_crop(
                   whole, [min(size)] * 2), [16, 16])).transpose(2, 0, 1)).max() <= 4


# ---- around the program ----------------------------------------------------------------------
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(stage, tmp_path, monkeypatch, capsys, number):
    def lockf(*args):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(stage(1).fcntl, "lockf", lockf)
    with stage(1).lock_folder(tmp_path):
        assert "cannot be locked" in capsys.readouterr().out


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_a_folder_in_use_is_refused_by_either_error(stage, tmp_path, monkeypatch, number):
    def lockf(*args):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(stage(1).fcntl, "lockf", lockf)
    with pytest.raises(SystemExit, match="in use by another run"):
        with stage(1).lock_folder(tmp_path):
            pass


@pytest.mark.parametrize("left", [["RANK"], ["RANK", "WORLD_SIZE"], ["LOCAL_RANK"],
                                  ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"]])
def test_what_a_launcher_left_behind_does_not_matter(stage, tmp_path, monkeypatch, left):
    for name in left:
        monkeypatch.setenv(name, "1")
    seen = []
    start(stage, tmp_path, lambda args, device: seen.append(stage(1).world()))
    assert seen == [1]


def test_a_terminal_of_plain_letters_is_enough(stage, tmp_path):
    """LC_ALL=C PYTHONUTF8=0: what has no letter there is replaced, and the run goes on."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(screen):
        start(stage, tmp_path, lambda args, device: stage(1).print0("5 ± 1, 红"))
    screen.flush()
    assert screen.buffer.getvalue() == b"5 ? 1, ?\n"
    with contextlib.redirect_stdout(io.StringIO()) as text:                   # as in a notebook
        start(stage, tmp_path, lambda args, device: stage(1).print0("±"))
    assert text.getvalue() == "±\n"


def test_a_relative_path_is_found_from_another_folder(stage, tmp_path, monkeypatch):
    write_pictures(stage, tmp_path / "pictures", 60)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    launch(stage, 1, ["--data", "pictures", "--val", "./pictur*", "--smoke", "--out", "out"])
    monkeypatch.chdir(tmp_path / "elsewhere")
    settings, _ = stage(1).load_proxy(tmp_path / "out")
    assert len(stage(1).load_data(settings, "cpu")[0]) == 60


@pytest.mark.parametrize("width", [4, 20, 100, 400, 404, 772])
def test_every_width_that_divides_by_four_has_heads(stage, width):
    net = stage(1).DiT(16, 8, width, 1, 2)
    assert width % net.blocks[0].heads == 0
    assert net(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.ones(1, 2).long()).shape[1] == 3


def test_usual_widths_keep_their_heads(stage):
    heads = {width: stage(1).DiT(16, 8, width, 1, 2).blocks[0].heads for width in
             (16, 64, 96, 256, 384, 768)}
    assert heads == {16: 4, 64: 4, 96: 4, 256: 4, 384: 6, 768: 12}
