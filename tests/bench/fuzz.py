"""``python -m tests.bench.fuzz``: mutated files through the commands, each in a process of its own.

Counts crashes, hangs, tracebacks, memory blow-ups, files written where none belong, good files lost
beside bad ones, and damaged content that a command takes for whole though its hash is there. Exit
status 1 if anything was found. Each input depends on the seed and its number alone:
``--only KIND:NUMBER`` runs it again, and its folder below ``--out`` has it with the command.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.mutate import mutated
from tests.forks import forked

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 60.0
LIMIT_BYTES = 2 << 30
"""What a command may take above what its modules take."""
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}
STATUSES = {("status",): (0, 1, 2, 3, 4)}
"""Where they are more than those that every command has."""

TOLD = 20_000
"""Characters of a command's words that are looked at and kept."""


@dataclass(frozen=True)
class Case:
    """A command over a folder ``in`` with one file changed; it writes into ``out``."""

    changed: str
    command: tuple[str, ...]
    hashed: bool = False
    """Whether a hash beside the changed file lets the command see the change."""
    good: str = ""
    """A file whose score must come out whatever happens to the other."""


Draw = Callable[[random.Random, Path, Path], Case]


def copied(base: Path, name: str, into: Path) -> Path:
    """A part of the seeds, in a case's folder."""
    shutil.copytree(base / name, into / Path(name).name, dirs_exist_ok=True)
    return into / Path(name).name


def pick(rng: random.Random, folder: Path, *patterns: str) -> str:
    """One of the files of a folder, below the case's ``in``."""
    found = sorted({path for pattern in patterns for path in folder.rglob(pattern)})
    return str(rng.choice([p for p in found if p.is_file()]).relative_to(folder.parent))


def audio(rng: random.Random, base: Path, into: Path) -> Case:
    """Sound, beside a whole file, through what walks folders."""
    name = pick(rng, copied(base, "audio", into), "*.*").removeprefix("audio/")
    for other in (into / "audio").iterdir():
        if other.name != name:
            other.unlink()
    if rng.random() < 0.7:
        shutil.copy(base / "corpora/speech/talker0/0.wav", into / "audio/good.wav")
        extra = rng.choice(([], ["--channels", "each"], ["--mode", "fast"], ["--curve"]))
        words = ("train", "score", "in/audio", "--model", str(base / "models/run"), *extra)
        return Case(f"audio/{name}", (*words, "--out", "out/t.csv"), good="good.wav")
    corpus = [f"{n}={base / 'corpora' / n}" for n in ("speech", "noise")] + ["speech=in/audio"]
    flags = [word for one in corpus for word in ("--corpus", one)]
    recipe = str(base / "specs/recipe.yaml")
    verb = rng.choice((["manifest", recipe], ["plan", recipe, "--samples", "4"]))
    return Case(f"audio/{name}", ("pipeline", *verb, *flags, "--out", "out"))


def shards(rng: random.Random, base: Path, into: Path) -> Case:
    """Tars and their records, through what reads shards."""
    folder = copied(base, "dataset", into)
    changed = pick(rng, folder, "shard-*.tar", "shard-*.tar", "shard-*.json")
    what = rng.random()
    if what < 0.5:
        verify = ("pipeline", "verify", "--deep", "in/dataset")  # a shard's record has no hash
        return Case(changed, verify, hashed=changed.endswith(".tar"))
    if what < 0.75:
        words = rng.choice((["--count", "2"], ["--each-processor"]))
        return Case(changed, ("pipeline", "preview", "in/dataset", "--out", "out/p.html", *words))
    if what < 0.9:
        return Case(changed, ("pipeline", "replay", "000000001", "--dataset", "in/dataset"))
    run = ("--run", str(base / "models/run"), "--shards", "in/dataset")
    return Case(changed, ("train", "report", *run, "--out", "out/r.html"))


def learning(rng: random.Random, base: Path, into: Path) -> Case:
    """Shards through the trainer."""
    folder = copied(base, "dataset", into)
    changed = pick(rng, folder, "*.tar", "*.json")
    words = ["--student", "v1", "--shards", "in/dataset", "--validation", str(base / "dataset")]
    words += ["--preset", "fast", "--steps", "1", "--batch", "2", "--workers", "0", "--logger"]
    words += ["none", "--precision", "fp32", "--device", "cpu", "--out", "out/run"]
    return Case(changed, ("train", "fit", *words))


def dataset(rng: random.Random, base: Path, into: Path) -> Case:
    """A dataset's description and manifests."""
    folder = copied(base, "dataset", into)
    changed = pick(rng, folder, "dataset.json", "manifests/*", "attempts/*", "*.json")
    verb = rng.choice(("verify", "verify", "status", "card", "preview", "finish", "merge"))
    if verb == "merge":
        return Case(changed, ("pipeline", "merge", "in/dataset", "--out", "out/merged"))
    if verb == "preview":
        return Case(changed, ("pipeline", "preview", "in/dataset", "--out", "out/p.html"))
    deep = ("--deep",) if verb == "verify" else ()
    hashed = bool(deep) and changed.endswith(("dataset.json", ".parquet"))
    return Case(changed, ("pipeline", verb, *deep, "in/dataset"), hashed=hashed)


def specs(rng: random.Random, base: Path, into: Path) -> Case:
    """YAML of every sort."""
    name = Path(pick(rng, copied(base, "specs", into), "*.yaml")).name
    path = f"in/specs/{name}"
    if name == "rooms.yaml":
        command = ("corpora", "rooms", "--spec", path, "--out", "out/rooms", "--count", "0")
    elif name == "site.yaml":
        kind = rng.choice(("slurm", "slurm-array", "kubernetes", "ray"))
        job = (str(ROOT / "data_specs/recipes/demo.yaml"), "--out", "/shared/o", "--samples", "4")
        command = ("submit", kind, "--site", path, "--dry-run", "--", *job)
        for corpus in ("speech", "noise", "rooms"):
            command += ("--corpus", f"{corpus}=/shared/{corpus}")
    else:
        flags: tuple[str, ...] = ()
        for corpus in ("speech", "noise"):
            flags += ("--corpus", f"{corpus}={base / 'corpora' / corpus}")
        command = ("plan", path, "--samples", "4", *flags, "--out", "out/plan")
    return Case(f"specs/{name}", ("pipeline", *command))


def tables(rng: random.Random, base: Path, into: Path) -> Case:
    """Rated clips, lists and tables of scores."""
    copied(base, "tables", into)
    model = ("--model", str(base / "models/run"))
    name = rng.choice(("labels.csv", "list.txt", "scores.csv"))
    if name == "labels.csv":
        words = ("evaluate", *model, "--rated", "in/tables/labels.csv", "--resamples", "10")
        return Case(f"tables/{name}", ("train", *words, "--out", "out/e"))
    out = "in/tables/scores.csv" if name == "scores.csv" else "out/t.csv"
    words = ("score", "in/tables/list.txt", *model, "--curve", "--out", out)
    return Case(f"tables/{name}", ("train", *words))


def models(rng: random.Random, base: Path, into: Path) -> Case:
    """Weights, descriptions, checkpoints, heads and bundles."""
    kind = rng.choice(("run", "run", "checkpoint", "pruned", "head", "bundle", "bundle"))
    folder = copied(base, f"models/{kind}", into)
    changed = pick(rng, folder, "*.safetensors", "*.json", "*.pt", "*.onnx", "SHA256SUMS*")
    model = f"in/{changed}" if changed.endswith((".onnx", ".pt")) else f"in/{kind}"
    hashed = kind in ("bundle", "run", "pruned") and changed.endswith((".safetensors", ".onnx"))
    clip = str(base / "tables/0.wav")
    if kind == "run" and rng.random() < 0.05:
        return Case(changed, ("train", "export", "--model", "in/run", "--out", "out/b"), hashed)
    return Case(changed, ("train", "score", clip, "--model", model, "--out", "out/t.csv"), hashed)


KINDS: dict[str, tuple[Draw, int]] = {
    "audio": (audio, 30),
    "shards": (shards, 20),
    "learning": (learning, 2),
    "dataset": (dataset, 12),
    "specs": (specs, 16),
    "tables": (tables, 10),
    "models": (models, 20),
}
"""How each kind is drawn, and its share."""


# --- one input ------------------------------------------------------------------------------------


def prepared(kind: str, number: int, seed: int, base: Path, folder: Path) -> Case:
    """Write an input below ``folder``: ``in`` with one file changed, ``out`` empty."""
    rng = random.Random(f"{seed} {kind} {number}")
    (folder / "in").mkdir(parents=True)
    (folder / "out").mkdir()
    case = KINDS[kind][0](rng, base, folder / "in")
    path = folder / "in" / case.changed
    data = mutated(rng, path.name, path.read_bytes())
    path.unlink()  # the seeds' own file must not change
    path.write_bytes(data)
    return case


def command_of(case: Case, folder: Path) -> int:
    """Run the command as its own program would, in so much memory; the exit status."""
    os.chdir(folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, used + LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from pipeline.__main__ import main as pipeline
    from train.__main__ import main as train

    cli, *argv = case.command
    return (pipeline if cli == "pipeline" else train)(argv)


def tried(case: Case, folder: Path, limit_s: float) -> tuple[int | None, float]:
    """How a child over this case ended, and its peak in bytes."""
    return forked(partial(command_of, case, folder), folder / "said", limit_s)


def verdict(case: Case, folder: Path, code: int | None, grown: float) -> str:
    """What is wrong with how a case ended; empty where nothing is."""
    said = (folder / "said").read_text(errors="replace") if (folder / "said").exists() else ""
    if code is None:
        return "hang"
    if code < 0:
        return "crash" if -code in CRASHES else f"signal {-code}"
    if "MemoryError" in said or "Cannot allocate" in said or grown > LIMIT_BYTES:
        return "memory"
    if "Traceback (most recent call last)" in said:
        return "traceback"
    if {path.name for path in folder.iterdir()} - {"in", "out", "said"}:
        return "escaped"
    if code not in STATUSES.get(case.command[1:2], (0, 1, 2)):
        return f"status {code}"
    if code and not said.strip():
        return "silent"
    if case.hashed and code == 0:
        return "accepted"
    return "lost" if case.good and not scored(folder / "out/t.csv", case.good) else ""


def scored(table: Path, name: str) -> bool:
    """Whether a table has a score for a file."""
    if not table.is_file():
        return False
    with table.open(newline="", errors="replace") as file:
        return any(
            name in (row.get("path") or "") and row.get("mos") for row in csv.DictReader(file)
        )


# --- many inputs ----------------------------------------------------------------------------------


def kinds_of(inputs: int, seed: int) -> Iterator[tuple[str, int]]:
    """The kind of each input, by its share, and its number within the run."""
    rng = random.Random(seed)
    names, shares = list(KINDS), [share for _, share in KINDS.values()]
    for number in range(inputs):
        yield rng.choices(names, shares)[0], number


def serve(options: argparse.Namespace, base: Path, part: int) -> None:
    """Run every ``workers``-th input in a fork of this process; a line of JSON for each."""
    import torch

    torch.set_num_threads(1)
    warm(base)
    at_rest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    todo = [options.only] if options.only else list(kinds_of(options.inputs, options.seed))
    for kind, number in todo[part :: options.workers]:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
            folder = Path(place) / "case"
            began = time.monotonic()
            case = prepared(kind, number, options.seed, base, folder)
            code, peak = tried(case, folder, options.limit)
            what = verdict(case, folder, code, peak - at_rest)
            found = kept(options.out, kind, number, case, folder, what, base) if what else None
            line = {"kind": kind, "seconds": time.monotonic() - began, "found": found}
        print(json.dumps(line), flush=True)


def warm(base: Path) -> None:
    """Import what every command needs, once, before the first fork."""
    import pipeline.engine.make_shards  # noqa: F401
    import train.evaluation.evaluate
    import train.export.export
    import train.report.report
    import train.scoring.score
    import train.student.fit

    train.scoring.score.load(str(base / "models/run"))


def kept(
    out: Path, kind: str, number: int, case: Case, folder: Path, what: str, base: Path
) -> dict[str, Any]:
    """An input that a command did not take as it should, kept with the command to run it again."""
    place = out / f"{what.replace(' ', '-')}-{kind}-{number}"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place, symlinks=True, ignore_dangling_symlinks=True)
    cli, *argv = case.command
    command = shlex.join(["python", "-m", cli, *argv])
    (place / "command.sh").write_text(f"cd {shlex.quote(str(place))} && {command}\n")
    said = (folder / "said").read_bytes()[-TOLD:].decode(errors="replace").strip().splitlines()
    last = said[-1] if said else ""
    found = {"kind": kind, "number": number, "what": what, "changed": case.changed}
    return found | {"command": command, "last": last[:200], "folder": str(place)}


def gathered(options: argparse.Namespace, base: Path) -> list[dict[str, Any]]:
    """What the workers told."""
    words = ["--inputs", options.inputs, "--seed", options.seed, "--workers", options.workers]
    words += ["--limit", options.limit, "--out", options.out]
    if options.only:
        words += ["--only", ":".join(map(str, options.only))]
    command = [sys.executable, "-m", "tests.bench.fuzz", *map(str, words)]
    # Files, not pipes: one that is read after the others would fill, and its worker wait for them.
    files = [options.out / f"worker-{part}.jsonl" for part in range(options.workers)]
    workers = [
        subprocess.Popen(
            [*command, "--part", str(part), "--seeds", str(base)],
            cwd=ROOT,
            stdout=file.open("wb"),
            stderr=file.with_suffix(".log").open("wb"),
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for part, file in enumerate(files)
    ]
    if [worker for worker in workers if worker.wait()]:  # all are waited for
        raise RuntimeError(f"a worker ended early: see {options.out}/worker-*.log")
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


def summary(lines: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Counts by kind and by what was found."""
    found = [line["found"] for line in lines if line["found"]]
    return {
        "inputs": len(lines),
        "seconds": round(seconds, 1),
        "by_kind": dict(Counter(line["kind"] for line in lines)),
        "found": dict(Counter(one["what"] for one in found)),
        "findings": sorted(found, key=lambda one: (one["what"], one["kind"], one["number"])),
    }


def shown(told: dict[str, Any]) -> str:
    """The summary as text: findings alike stand together."""
    lines = [f"{told['inputs']} inputs in {told['seconds']:.0f} s: {told['by_kind']}"]
    alike = Counter((f["what"], f["kind"], f["last"][:110]) for f in told["findings"])
    example = {(f["what"], f["kind"], f["last"][:110]): f for f in told["findings"]}
    for key, count in alike.most_common():
        one = example[key]
        lines.append(f"{count:5} {key[0]:10} {key[1]:9} {one['changed']}: {key[2]}")
        lines.append(f"{'':17}{one['command']}\n{'':17}{one['folder']}")
    lines.append(f"found: {told['found'] or 'nothing'}")
    return "\n".join(lines)


def one_input(text: str) -> tuple[str, int]:
    """KIND:NUMBER."""
    kind, _, number = text.partition(":")
    return kind, int(number)


def main() -> int:
    """Run the inputs; exit status 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds an input may take")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="what was found")
    parser.add_argument("--only", type=one_input, metavar="KIND:NUMBER")
    parser.add_argument("--seeds", type=Path, help="folder of whole files (made where it is not)")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    base = (options.seeds or options.out / "seeds").resolve()
    if options.part is not None:
        serve(options, base, options.part)
        return 0
    options.workers = 1 if options.only else options.workers
    made = "from pathlib import Path; from tests.bench.seeds import make; make(Path({!r}))"
    subprocess.run([sys.executable, "-c", made.format(str(base))], cwd=ROOT, check=True)
    began = time.monotonic()
    told = summary(gathered(options, base), time.monotonic() - began)
    (options.out / "summary.json").write_text(json.dumps(told, indent=1) + "\n")
    text = shown(told)
    (options.out / "summary.txt").write_text(text + "\n")
    print(text)
    return 1 if told["found"] else 0


if __name__ == "__main__":
    sys.exit(main())
