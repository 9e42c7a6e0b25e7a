"""What the end of all four scripts does, seen in cem_sup: sets of samples and results, resuming, a folder for one
process, text for every terminal, errors in one line."""
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import binary_at_ebm
import cem_sup
import conftest
import jeat
import metrics
import samplers
from conftest import DRAW, ROOT, run_script
from samplers import progress, say

TINY = ("--smoke --batch-size 128 --limit 256 --num-samples 20 --epochs 2 --sample-steps 3 --attack-steps 1 "
        "--device cpu").split()
CS, TA, RCS = (f"{name}_num-samples-20_steps-3" for name in ("cs", "ta", "rcs"))  # TINY's sets
error = partial(conftest.error, cem_sup)


def few(n, seed):
    """256 to train on and 20 to test on are enough here."""
    return DRAW({2000: 256, 250: 20}.get(n, n), seed)


@pytest.fixture(autouse=True)
def few_images(digits_are_drawn_once, monkeypatch):
    monkeypatch.setattr(samplers, "drawn_digits", few)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "drawn_digits", few)
        cem_sup.main([*TINY, "--out", str(out)])
    return out


@pytest.fixture
def run(tiny, tmp_path):
    """A copy of a finished run of TINY."""
    return shutil.copytree(tiny, tmp_path / "run")


def again(out, *flags):
    """The same command, with other flags besides."""
    cem_sup.main([*TINY, "--out", str(out), *flags])


def results_of(out):
    return json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)


def samples_of(out, name):
    return np.load(out / f"samples_{name}.npz")["arr_0"]


# ---------------------------------------------------------------- sets of samples and results


def test_three_samplings_of_one_checkpoint_leave_three_sets_and_their_rows(run):
    files = {path.name: path.read_bytes() for path in run.iterdir() if path.name != "results.json"}
    before = results_of(run)
    again(run, "--sampler", "cs", "--start", "pooled", "--sample-step-size", "0.2")
    again(run, "--sampler", "cs", "--sample-seed", "1")
    after = results_of(run)
    other, second = "cs_start-pooled_num-samples-20_steps-3_step-size-0.2", "cs_num-samples-20_seed-1_steps-3"
    assert after["samples"].keys() == before["samples"].keys() | {other, second}
    assert after.pop("samples").items() >= before.pop("samples").items() and after == before
    assert all((run / name).read_bytes() == content for name, content in files.items())
    assert not np.array_equal(samples_of(run, CS), samples_of(run, second))  # other starts of the same net
    row = results_of(run)["samples"][other]
    assert row["flags"]["start"] == "pooled" and row["flags"]["sample_step_size"] == 0.2 and row["n"] == 20


def test_what_is_there_is_not_made_again(run, monkeypatch, capsys):
    for name in ("sample", "accuracy", "train_step"):
        monkeypatch.setattr(cem_sup, name, lambda *args, **more: pytest.fail("made again"), raising=False)
    results = results_of(run)
    again(run)
    again(run, "--test-images", "5")  # the figures of more images stay
    assert results_of(run) == results and results["accuracy"]["n"] == 20
    again(run, "--sample-step-size", "0.5", "--sampler", "cs")  # given, but the default
    assert "pgd20" in capsys.readouterr().out


def test_a_deleted_set_is_drawn_again_and_more_epochs_void_all(run, capsys):
    images = samples_of(run, RCS)
    (run / f"samples_{RCS}.npz").unlink()
    again(run, "--sampler", "rcs")
    assert np.array_equal(samples_of(run, RCS), images)
    again(run, "--epochs", "3", "--sampler", "cs")
    assert "--epochs was 2" in capsys.readouterr().out
    results = results_of(run)
    assert set(results["samples"]) == {CS} and results["epochs"] == 3
    assert torch.load(run / "checkpoint.pt", weights_only=True)["epoch"] == 3


def test_results_of_another_training_do_not_stay(run):
    (run / "checkpoint.pt").unlink()
    again(run, "--seed", "5", "--sampler", "cs")
    assert set(results_of(run)["samples"]) == {CS} and results_of(run)["training"]["seed"] == 5


def test_each_piece_is_written_as_soon_as_it_exists(run, monkeypatch):
    (run / "results.json").unlink()
    sample = cem_sup.sample

    def second_breaks(f, sampler, start, args):
        if sampler == "cs":
            raise ZeroDivisionError
        return sample(f, sampler, start, args)
    monkeypatch.setattr(cem_sup, "sample", second_breaks)
    with pytest.raises(ZeroDivisionError):
        again(run, "--sampler", "ta", "cs")
    assert set(results_of(run)["samples"]) == {TA} and results_of(run)["accuracy"]["n"] == 20


def test_a_set_of_the_same_name_made_with_other_flags_is_drawn_anew(run):
    """Names leave out what is at its default, which differs with and without a preset."""
    results = results_of(run)
    results["samples"][CS]["flags"]["sample_steps"] = 60
    (run / "results.json").write_text(json.dumps(results))
    images = samples_of(run, CS)
    (run / f"samples_{CS}.npz").write_bytes(b"of 60 steps")
    again(run, "--sampler", "cs")
    assert results_of(run)["samples"][CS]["flags"]["sample_steps"] == 3
    assert np.array_equal(samples_of(run, CS), images)


def test_a_damaged_results_file_is_named(run, capsys):
    (run / "results.json").write_text("{")
    assert "results.json is damaged" in error(capsys, *TINY, "--out", run)


def test_infinite_radii_are_strict_json(run):
    again(run, "--sampler", "ta", "--sample-eps", "inf")
    assert results_of(run)["samples"]["ta_num-samples-20_steps-3_eps-inf"]["flags"]["sample_eps"] == "inf"


def test_the_split_is_the_gaussians(run):
    again(run, "--sampler", "ta", "--start", "fields", "--start-split", "test")
    row = results_of(run)["samples"]["ta_start-fields_num-samples-20_steps-3"]
    assert "start_split" not in row["flags"]


def test_names_of_sets():
    """Paths and lists too make a file's name."""
    name = lambda *flags: cem_sup.set_of_samples(cem_sup.parse_args(list(flags)), "cs")[0]  # noqa: E731
    assert name() == "cs" and name("--small") == "cs" and name("--smoke", "--sample-steps", "30") == "cs"
    paths = [name("--start", path) for path in ("a/b c.npy", "a-b-c.npy", "x" * 300, "x" * 301)]
    assert paths[0].startswith("cs_start-a-b-c.npy-") and paths[1] == "cs_start-a-b-c.npy"
    assert len(set(paths)) == 4 and max(map(len, paths)) < 200
    assert name("--start-split", "test") == "cs_start-split-test"
    unused = cem_sup.set_of_samples(cem_sup.parse_args(["--start-split", "test"]), "cs", "start_split")
    assert unused[0] == "cs" and "start_split" not in unused[1]
    assert name("--smoke", "--sample-steps", "60") == "cs_steps-60"


def scores_with(monkeypatch, run, score):
    """The rows of cs and ta, scored as on a GPU by a module metrics that holds `score`."""
    args = cem_sup.parse_args([*TINY, "--out", str(run), "--data", "da ta"])
    args.device, args.smoke = "cuda", False
    monkeypatch.setitem(sys.modules, "metrics", types.SimpleNamespace(**score))
    results = results_of(run)
    cem_sup.add_is_and_fid(args, results, [CS, TA])
    assert results_of(run) == results
    return results["samples"]


def test_scores_or_the_reason(run, monkeypatch, capsys):
    calls = []

    def score(paths, data, device):
        calls.append((Path(paths[0]).name, data, device))
        yield {"file": paths[0], "n": 20, "is_mean": 2.0, "is_std": 0.1, "fid": 50.0}

    def no_weights(paths, data, device):
        raise OSError("no\nweights")
    assert scores_with(monkeypatch, run, {"score": no_weights})[TA]["reason"] == "OSError: no weights"
    command = capsys.readouterr().out.strip().splitlines()[-1]
    assert command.endswith(f"samples_{TA}.npz --data 'da ta'")  # quoted for a shell
    assert command.startswith("IS and FID: python metrics.py ")
    foreign = scores_with(monkeypatch, run, {"something": 1})  # somebody else's module of that name
    assert foreign[CS]["fid"] is None and "ImportError" in foreign[CS]["reason"] and foreign[CS]["n"] == 20
    capsys.readouterr()
    rows = scores_with(monkeypatch, run, {"score": score})
    assert "IS and FID:" not in capsys.readouterr().out  # they are there
    assert calls == [(f"samples_{CS}.npz", "da ta", "cuda"), (f"samples_{TA}.npz", "da ta", "cuda")]
    assert rows[TA]["fid"] == 50.0 and rows[TA]["moved"] > 0 and rows[TA]["reason"] is None
    rows = scores_with(monkeypatch, run, {"score": no_weights})  # what is scored stays so, on a CPU too
    cem_sup.add_is_and_fid(cem_sup.parse_args(["--device", "cpu", "--out", str(run)]), results_of(run), [TA])
    assert results_of(run)["samples"][TA] == rows[TA] and rows[TA]["fid"] == 50.0 and rows[TA]["reason"] is None


def test_scores_on_a_cpu_are_for_later(run, capsys):
    args = cem_sup.parse_args(["--out", str(run), "--device", "cpu"])
    cem_sup.add_is_and_fid(args, results_of(run), [CS])
    assert "hours on a CPU" in results_of(run)["samples"][CS]["reason"]
    assert f"python metrics.py {run}/samples_{CS}.npz --data ./data" in capsys.readouterr().out
    assert metrics.load_images(run / f"samples_{CS}.npz").shape == (20, 3, 32, 32)  # what that command reads


# ---------------------------------------------------------------- resume and the log


def same_end(a, b):
    one, two = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (a, b))
    momentum = [[s["momentum_buffer"] for s in c["optimizer"]["state"].values()] for c in (one, two)]
    return (one["epoch"] == two["epoch"] and torch.equal(one["rng"], two["rng"])
            and all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
            and all(map(torch.equal, *momentum)) and results_of(a)["accuracy"] == results_of(b)["accuracy"]
            and all(np.array_equal(samples_of(a, n), samples_of(b, n)) for n in (CS, TA, RCS)))


def start_and_stop(out, flags, sign, when):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it would be ignored, by heirs too
    process = subprocess.Popen([sys.executable, str(ROOT / "cem_sup.py"), *flags, "--out", str(out)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not when() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(sign)
    _, err = process.communicate()
    return process.returncode, err


def epochs_of(out):
    return [json.loads(line)["epoch"] for line in open(out / "log.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ["--no-amp", "--amp"])
def test_killed_and_interrupted_runs_end_where_an_uninterrupted_one_does(tmp_path, monkeypatch, rounding):
    monkeypatch.setattr(samplers, "drawn_digits", DRAW)  # what the processes draw
    flags, out = [*TINY, "--epochs", "4", "--test-images", "20", rounding], tmp_path / "stopped"
    cem_sup.main([*flags, "--out", str(tmp_path / "whole")])
    code, _ = start_and_stop(out, flags, signal.SIGKILL, lambda: (out / "checkpoint.pt").exists())
    assert code == -signal.SIGKILL
    epoch = torch.load(out / "checkpoint.pt", weights_only=True)["epoch"]
    assert epoch < 4
    saved = (out / "checkpoint.pt").stat().st_mtime_ns
    code, err = start_and_stop(out, flags, signal.SIGINT, lambda: (out / "checkpoint.pt").stat().st_mtime_ns > saved)
    assert code == 130 and err.strip().startswith("cem_sup.py: error: interrupted") and "Traceback" not in err
    cem_sup.main([*flags, "--out", str(out)])
    assert same_end(tmp_path / "whole", out) and epochs_of(out) == [1, 2, 3, 4]


def test_each_epoch_is_once_in_the_log_whenever_the_run_is_killed(run, tmp_path, monkeypatch):
    """Here between an epoch's line and its checkpoint; and a line that was cut."""
    def killed(args, epoch, **parts):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(cem_sup, "save_checkpoint", killed)
        again(run, "--epochs", "4")
    assert epochs_of(run) == [1, 2, 3]
    again(run, "--epochs", "4", "--sampler", "cs")
    assert epochs_of(run) == [1, 2, 3, 4]


def test_a_renamed_copy_goes_on_with_the_run(run, tmp_path, monkeypatch, capsys):
    copy = shutil.copy(ROOT / "cem_sup.py", tmp_path / "my_cem.py")
    monkeypatch.syspath_prepend(tmp_path)
    my_cem = __import__(Path(copy).stem)
    my_cem.main([*TINY, "--out", str(run), "--epochs", "3", "--sampler", "cs"])
    assert "2 of 3 epochs are done" in capsys.readouterr().out and epochs_of(run) == [1, 2, 3]


def test_what_is_no_checkpoint_of_this_training_is_refused(run, tmp_path, capsys, monkeypatch):
    assert "--attack-eps was 2.0, is 1.0" in error(capsys, *TINY, "--out", run, "--attack-eps", 1)
    assert "cannot be fewer" in error(capsys, *TINY, "--out", run, "--epochs", 1)
    checkpoint = run / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)

    class Pickle:
        def __reduce__(self):
            return Path.touch, (tmp_path / "loaded",)
    jeats = {**state, "flags": {"method": "jeat", "batch_size": 128}}
    for content, words in (({"state_dict": {}}, "cannot be used"), (Pickle(), "cannot be used"),
                           (jeats, "--method was jeat, is None")):
        torch.save(content, checkpoint)
        before = checkpoint.read_bytes()
        line = error(capsys, *TINY, "--out", run)
        assert words in line and checkpoint.read_bytes() == before
        assert "weights_only" not in line  # torch advises to load it unsafely
    assert not (tmp_path / "loaded").exists()
    checkpoint.write_bytes(b"PK half")
    assert "cannot be used" in error(capsys, *TINY, "--out", run)

    def denied(*args, **more):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(torch, "load", denied)
    line = error(capsys, *TINY, "--out", run)
    assert "Permission denied" in line and "damaged" not in line


# ---------------------------------------------------------------- a folder for one process


def test_a_second_run_in_a_folder_ends_at_once(run, capsys):
    with samplers.claimed(run):
        assert "another run is at work" in error(capsys, *TINY, "--out", run)
    again(run)
    done = run_script("cem_sup", *TINY, "--out", run)
    assert "2 of 2 epochs" in done.stdout


def test_two_smoke_runs_do_not_delete_each_others_files(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "runs/cem_sup-smoke")
    with samplers.claimed("runs/cem_sup-smoke"):
        assert "another run is at work" in error(capsys, *TINY)
    assert Path("runs/cem_sup-smoke/checkpoint.pt").exists()


@pytest.mark.parametrize("link", [False, True])
def test_a_bare_smoke_run_begins_afresh(run, tmp_path, monkeypatch, capsys, link):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    (run / "notes.txt").write_text("mine")
    if link:
        Path("runs/cem_sup-smoke").symlink_to(run)
    else:
        shutil.copytree(run, "runs/cem_sup-smoke")
    cem_sup.main([*TINY, "--seed", "5", "--sampler", "ta", "--epochs", "1"])
    assert "runs/cem_sup-smoke: begins" in capsys.readouterr().out
    left = {path.name for path in Path("runs/cem_sup-smoke").iterdir()}
    assert left == {".lock", "notes.txt", "checkpoint.pt", "log.jsonl", "results.json", f"samples_{TA}.npz",
                    f"samples_{TA}.png"}
    assert epochs_of(Path("runs/cem_sup-smoke")) == [1]


def test_out_may_begin_with_a_tilde_but_not_be_empty(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = cem_sup.parse_args(["--out", "~/a", "--data", "~/b"])
    assert args.out == f"{tmp_path}/a" and args.data == f"{tmp_path}/b"
    monkeypatch.chdir(tmp_path)
    assert "--out is empty" in error(capsys, *TINY, "--out", "")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_seen_before_the_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cem_sup, "train", lambda *args: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    assert "file" in error(capsys, *TINY, "--out", tmp_path / "file" / "below")
    (tmp_path / "read-only").mkdir()
    (tmp_path / "read-only" / ".lock").mkdir()  # for root may write everywhere
    assert ".lock" in error(capsys, *TINY, "--out", tmp_path / "read-only")


def test_a_refused_run_leaves_no_folder(tmp_path, capsys):
    assert "no.npy" in error(capsys, *TINY, "--out", tmp_path / "out", "--start", "no.npy")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- text


class Stdout(io.TextIOWrapper):
    def __init__(self, encoding="utf-8", terminal=False):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def text(self):
        return self.buffer.getvalue().decode(self.encoding)


def test_say_costs_nothing(monkeypatch):
    ascii_only = Stdout("ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    say("Übung \udce9.npz")
    assert ascii_only.text() == "\\xdcbung \\udce9.npz\n"
    closed = io.StringIO()
    closed.close()
    broken = Stdout()
    monkeypatch.setattr(broken, "write", lambda text: (_ for _ in ()).throw(BrokenPipeError()), raising=False)
    for stdout in (None, closed, broken, types.SimpleNamespace(write=lambda text: None, flush=lambda: None)):
        monkeypatch.setattr(sys, "stdout", stdout)
        say("anything")
        assert list(progress([[1, 2], [3]], "what")) == [[1, 2], [3]]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_progress_line(monkeypatch, terminal):
    """On a terminal it rewrites itself; elsewhere there is one each half minute. A clock may stand still."""
    stdout, clock = Stdout(terminal=terminal), iter([0, 0, 10, 29, 31, 40, 62, 70])
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert len(list(progress([[0] * 10] * 7, "epoch 1"))) == 7
    assert stdout.text().count("\x1b[K") == (7 if terminal else 0)
    lines = stdout.text().replace("\x1b[K", "").replace("\r", "\n").splitlines()
    assert len(lines) == (7 if terminal else 3)
    assert lines[-1] == "epoch 1: 70/70 images, 1/s, 0 s left" and "40/70 images, 1/s, 23 s left" in stdout.text()


@pytest.mark.slow
def test_a_path_that_the_terminal_cannot_print(tmp_path, monkeypatch):
    flags = [*TINY, "--epochs", "1", "--sampler", "cs", "--test-images", "10"]
    out = tmp_path / "Übung"
    done = run_script("cem_sup", *flags, "--out", out, env={"PYTHONIOENCODING": "ascii"})
    assert "\\xdcbung: begins" in done.stdout and results_of(out)["samples"][CS]["n"] == 20
    command = [sys.executable, str(ROOT / "cem_sup.py"), *flags, "--out", os.fsencode(tmp_path) + b"/\xe9"]
    subprocess.run([*command, "--seed", "1"], check=True, capture_output=True, cwd=ROOT)
    shell = f"{sys.executable} cem_sup.py {' '.join(flags)} --seed 2 --out {tmp_path}/closed >&- 2>&-"
    assert subprocess.run(shell, shell=True, cwd=ROOT).returncode == 0
    assert (tmp_path / "closed" / "results.json").exists()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("flags, words", [
    ("--no-such-flag", "--no-such-flag"), ("--epoch 3", "--epoch"), ("--arch vgg", "vgg"),
    ("--batch-size 0", "not in 1"), ("--lr nan", "not in"), ("--attack-steps -1", "not in"),
    ("--attack-eps inf", "not in"), (f"--seed {2 ** 63}", "not in"), ("--epochs x", "int"),
    ("--lr-drops 50 100", "50 is not in 0 ... 1"),
    ("--sampler gan", "gan"), ("--device tpu", "tpu"), ("--norm l1", "l1"), ("--limit 5", "ten classes"),
    ("--sample-step-size inf", "not in"), ("--start no.npy", "no.npy"), ("--small", "not both"),
    ("--norm linf", "--attack-eps and --attack-step-size"), ("--norm linf --attack-eps 0.03", "--attack-step-size"),
    ("--start cifar100", "downloads nothing"),
    ("--sample-norm linf", "--sample-step-size"), ("--seed 1.5", "int")])
def test_wrong_flags(flags, words, capsys, tmp_path):
    assert words in error(capsys, "--smoke", "--out", tmp_path / "out", *flags.split())
    assert not (tmp_path / "out").exists()


def test_another_norm_with_its_lengths_is_taken():
    args = cem_sup.parse_args("--norm linf --attack-eps 0.03 --attack-step-size 0.01 --norm linf".split())
    assert args.norm == "linf" and cem_sup.parse_args(["--norm", "l2"]).attack_eps == 0.5


def test_all_lengths_of_a_norm_are_asked_for(capsys):
    """AT-EBM's ball around the data has one of its own; JEAT's step follows its radius; infinite radii fit any norm."""
    flags = "--mode ood --norm linf --attack-eps 0.03 --attack-step-size 0.01".split()
    assert "--positive-eps" in conftest.error(binary_at_ebm, capsys, *flags)
    assert binary_at_ebm.parse_args([*flags[2:]]).positive_eps == np.inf
    assert jeat.parse_args("--norm l2 --attack-eps 0.5".split()).attack_step_size == 0.5


def test_an_edits_error_keeps_its_traceback(run, monkeypatch):
    """Only what the user gave is one line: people edit these files."""
    for failure in (ValueError("shapes (3, 4) and (5,)"), RuntimeError("an illegal memory access"), KeyError("x")):
        monkeypatch.setattr(cem_sup, "sample", lambda *args, failure=failure: (_ for _ in ()).throw(failure))
        with pytest.raises(type(failure)):
            again(run, "--sample-seed", "7")


def test_out_of_memory_and_a_full_disk_say_so(run, capsys, monkeypatch):
    def full(f, sampler, start, args):
        raise failure
    for failure in (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB"), MemoryError("numpy")):
        with monkeypatch.context() as patch:
            patch.setattr(cem_sup, "sample", full)
            assert "--sample-batch-size" in error(capsys, *TINY, "--out", run, "--sample-seed", 7)
    before = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt.tmp").symlink_to("/dev/full")
    assert "No space left" in error(capsys, *TINY, "--out", run, "--epochs", 3)
    assert (run / "checkpoint.pt").read_bytes() == before and not (run / "checkpoint.pt.tmp").exists()


def test_divergence_stops_and_keeps_the_last_good_checkpoint(run, capsys, monkeypatch):
    before = (run / "checkpoint.pt").read_bytes()

    def last_step_breaks(f, x, y, **attack):  # a finite loss whose gradient is not
        return (f(x) ** 2 * 0).sum().sqrt()
    at_loss = cem_sup.at_loss
    for loss in (last_step_breaks, lambda *args, **attack: at_loss(*args, **attack) * float("nan")):
        monkeypatch.setattr(cem_sup, "at_loss", loss)
        line = error(capsys, *TINY, "--epochs", 3, "--out", run)
        assert "diverged in epoch 3" in line and "--epochs 2 the last" in line and "smaller --lr" in line
        assert (run / "checkpoint.pt").read_bytes() == before
    nan = lambda f, y: lambda x: f(x)[:, 0] * float("nan")  # noqa: E731
    monkeypatch.setitem(cem_sup.SAMPLERS, "cs", nan)
    assert "20 of 20 samples" in error(capsys, *TINY, "--out", run, "--sampler", "cs", "--sample-seed", 7)


@pytest.mark.slow
def test_no_data_and_no_network(tmp_path):
    nowhere = {k: "http://127.0.0.1:9" for k in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    done = run_script("cem_sup", "--data", tmp_path / "data", "--out", tmp_path / "out", env=nowhere, check=False)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and not (tmp_path / "out").exists()
    assert "cifar-10-batches-py" in lines[0] and "--smoke" in lines[0]


def test_a_long_run_on_a_cpu_says_so(capsys, monkeypatch, tmp_path):
    f = cem_sup.make_model("small-16").train()
    before = {name: t.clone() for name, t in f.state_dict().items()}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    samplers.say_how_long(cem_sup.parse_args(["--device", "cpu"]), f, forwards=50000 * 17)
    said = capsys.readouterr().out
    assert "hours; --small is made for a CPU" in said and "--amp" in said
    samplers.say_how_long(cem_sup.parse_args(["--device", "cpu", "--small", "--amp"]), f, forwards=1)
    said = capsys.readouterr().out
    assert "hours\n" in said and "--small" not in said and "--amp" not in said
    samplers.say_how_long(cem_sup.parse_args(["--device", "cpu", "--smoke"]), f, forwards=1)
    (tmp_path / "checkpoint.pt").touch()  # its epochs say how far they are
    samplers.say_how_long(cem_sup.parse_args(["--device", "cpu", "--out", str(tmp_path)]), f, forwards=1)
    assert capsys.readouterr().out == "" and f.training
    assert all(torch.equal(t, before[name]) for name, t in f.state_dict().items())


# ---------------------------------------------------------------- left behind


def test_main_leaves_nothing_behind(run, capsys):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    state = lambda: (socket.getdefaulttimeout(), cudnn.benchmark, cudnn.conv.fp32_precision,  # noqa: E731
                     matmul.fp32_precision, torch.get_default_dtype(), torch.is_grad_enabled())
    before = state()
    again(run, "--sampler", "cs", "--sample-seed", "3")
    error(capsys, *TINY, "--out", run, "--epochs", 1)
    assert state() == before


@pytest.mark.slow
def test_without_docstrings(tmp_path):
    """python -OO strips them."""
    for script in ("cem_sup", "metrics"):
        command = [sys.executable, "-OO", f"{script}.py", "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "--data" in done.stdout, done.stderr
