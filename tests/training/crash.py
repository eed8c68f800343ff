"""Runs `train` and kills the process (SIGKILL) at a named point: `python crash.py CONFIG POINT STEP`."""

import os
import signal
import sys


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def main(path, point, step):
    from jaxrl_post.training import checkpoint, config, loop, run_log, sampler

    if point == "after_a_step":
        write = run_log.RunLog.write
        run_log.RunLog.write = lambda self, number, metrics: (write(self, number, metrics), number == step and die())
    elif point == "during_a_rollout":
        sample = sampler.Sampler.begin
        calls = []

        def counted(self, params, problems, key, **options):
            calls.append(1)
            out = sample(self, params, problems, key, **options)
            return die() if "version" in options and options["version"] == step else out

        sampler.Sampler.begin = counted
    elif point == "half_a_line":

        def half(descriptor, row):
            if row["step"] == step:
                os.write(descriptor, b'{"step": %d, "rew' % step)
                die()
            append(descriptor, row)

        append, run_log._append = run_log._append, half
    elif point == "during_a_save":
        save = checkpoint.Checkpointer.save
        checkpoint.Checkpointer.save = lambda self, number, *rest, **options: (
            save(self, number, *rest, **options),
            number == step and die(),
        )
    elif point == "before_the_commit":
        from orbax.checkpoint._src.path import atomicity

        finalize = atomicity.AtomicRenameTemporaryPath.finalize

        async def last(self, *rest, **options):
            if self.get_final().name == str(step):
                die()
            await finalize(self, *rest, **options)

        atomicity.AtomicRenameTemporaryPath.finalize = last
    else:
        raise SystemExit(f"unknown point {point}")
    loop.run(config.load(path))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
