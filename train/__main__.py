"""``python -m train``: everything that reads shards."""

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


def _bench_loader(argv: list[str]) -> int:
    from train import bench_loader

    about = bench_loader.__doc__
    parser = argparse.ArgumentParser(prog="python -m train bench-loader", description=about)
    bench_loader.add_arguments(parser)
    return bench_loader.run(parser.parse_args(argv))


def _bench_presets(argv: list[str]) -> int:
    from train import bench_presets

    about = bench_presets.__doc__
    parser = argparse.ArgumentParser(prog="python -m train bench-presets", description=about)
    bench_presets.add_arguments(parser)
    return bench_presets.run(parser.parse_args(argv))


def _cross_validate(argv: list[str]) -> int:
    from train import cross_validate

    about = cross_validate.__doc__
    parser = argparse.ArgumentParser(prog="python -m train cross-validate", description=about)
    cross_validate.add_arguments(parser)
    return cross_validate.run(parser.parse_args(argv))


def _experiment(argv: list[str]) -> int:
    from train import experiment

    about = experiment.__doc__
    parser = argparse.ArgumentParser(prog="python -m train experiment", description=about)
    experiment.add_arguments(parser)
    return experiment.run(parser.parse_args(argv))


def _lengths(argv: list[str]) -> int:
    from train import lengths

    parser = argparse.ArgumentParser(prog="python -m train lengths", description=lengths.__doc__)
    lengths.add_arguments(parser)
    return lengths.run(parser.parse_args(argv))


def _prune(argv: list[str]) -> int:
    from train import prune

    parser = argparse.ArgumentParser(prog="python -m train prune", description=prune.__doc__)
    prune.add_arguments(parser)
    return prune.run(parser.parse_args(argv))


def _bench_prune(argv: list[str]) -> int:
    from train import bench_prune

    about = bench_prune.__doc__
    parser = argparse.ArgumentParser(prog="python -m train bench-prune", description=about)
    bench_prune.add_arguments(parser)
    return bench_prune.run(parser.parse_args(argv))


def _shrink(argv: list[str]) -> int:
    from train import shrink

    parser = argparse.ArgumentParser(prog="python -m train shrink", description=shrink.__doc__)
    shrink.add_arguments(parser)
    return shrink.run(parser.parse_args(argv))


def _variants(argv: list[str]) -> int:
    from train import variants

    parser = argparse.ArgumentParser(prog="python -m train variants", description=variants.__doc__)
    parser.parse_args(argv)
    print(variants.table())
    return 0


VERBS = {
    "fit": (_fit, "train a student on shards, or continue a run"),
    "teacher": (_teacher, "train a teacher's head on rated clips, or continue a run"),
    "cross-validate": (_cross_validate, "judge a teacher's head with and without scales, by folds"),
    "experiment": (_experiment, "students on labels against students on ratings (Figure 3)"),
    "lengths": (_lengths, "how well models score short crops, by length and filling"),
    "prune": (_prune, "prune a trained network round by round, or continue a run"),
    "shrink": (_shrink, "make a pruned or whole student smaller and faster in fact"),
    "evaluate": (_evaluate, "compare models with rated clips and with shards' labels"),
    "score": (_score, "score files, folders or lists to a CSV"),
    "report": (_report, "write one HTML page about a run"),
    "bench-loader": (_bench_loader, "how fast shards are read, against decoding alone"),
    "bench-presets": (_bench_presets, "the fast preset's training against the paper's"),
    "bench-prune": (_bench_prune, "a round of pruning the 2B model: memory, seconds, an estimate"),
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
