"""The parts of job `tune`: the space, its trials, Ray Tune, the results."""
