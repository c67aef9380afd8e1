"""``python -m train``: fit, teacher, evaluate, score, report, variants."""

from __future__ import annotations

import argparse
import sys


def _fit(argv: list[str]) -> int:
    from train import fit

    parser = argparse.ArgumentParser(prog="python -m train fit", description=fit.__doc__)
    fit.add_arguments(parser)
    return fit.run(parser.parse_args(argv))


def _evaluate(argv: list[str]) -> int:
    from train import evaluate

    parser = argparse.ArgumentParser(prog="python -m train evaluate", description=evaluate.__doc__)
    evaluate.add_arguments(parser)
    return evaluate.run(parser.parse_args(argv))


def _teacher(argv: list[str]) -> int:
    from train import teach

    parser = argparse.ArgumentParser(prog="python -m train teacher", description=teach.__doc__)
    teach.add_arguments(parser)
    return teach.run(parser.parse_args(argv))


def _score(argv: list[str]) -> int:
    from train import score

    parser = argparse.ArgumentParser(prog="python -m train score", description=score.__doc__)
    score.add_arguments(parser)
    return score.run(parser.parse_args(argv))


def _report(argv: list[str]) -> int:
    from train import report

    return int(report.main(argv) or 0)


def _bench_teacher(argv: list[str]) -> int:
    from train import bench_teacher

    about = bench_teacher.__doc__
    parser = argparse.ArgumentParser(prog="python -m train bench-teacher", description=about)
    bench_teacher.add_arguments(parser)
    return bench_teacher.run(parser.parse_args(argv))


def _variants(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m train variants").parse_args(argv)
    from train.models.student import VARIANTS, count

    print(
        f"{'name':5}{'parameters':>12}{'M MAC/clip':>12}{'tokens':>8}{'dim':>5}{'layers':>8}  conv"
    )
    for name, config in VARIANTS.items():
        parameters, macs = count(config)
        channels = "-".join(map(str, config.channels))
        print(
            f"{name:5}{parameters:12,}{macs / 1e6:12,.0f}{config.tokens:8}{config.dim:5}"
            f"{config.layers:8}  {channels}"
        )
    return 0


VERBS = {
    "fit": (_fit, "train a student on shards, or continue a run"),
    "teacher": (_teacher, "train a teacher's head on rated clips, or continue a run"),
    "evaluate": (_evaluate, "compare models with rated clips and with shards' labels"),
    "score": (_score, "score files, folders or lists to a CSV"),
    "report": (_report, "write one HTML page about a run"),
    "bench-teacher": (_bench_teacher, "the XLS-R teacher's speed, memory and precision"),
    "variants": (_variants, "list the students and what they cost"),
}


def main(argv: list[str]) -> int:
    """Run one verb; returns the exit code (2: wrong usage or input)."""
    parser = argparse.ArgumentParser(
        prog="python -m train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:14} {about}" for name, (_, about) in VERBS.items()),
    )
    parser.add_argument("verb", choices=VERBS)
    args = parser.parse_args(argv[:1])
    try:
        return VERBS[args.verb][0](argv[1:])
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
