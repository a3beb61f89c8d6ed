"""ldm_jax: latent diffusion models in JAX, from raw images to samples and metrics.

Floors; a module imports only from lower ones (`tests/test_floors.py` checks it):

    0  errors.py keys.py sharding.py   input errors, named randomness, meshes
       npz.py                          arrays of others
    1  diffusion/   arrays and callables: processes, objectives, guidance, samplers
       models/      parameters: Config, init, apply, axes
       data/        numpy, grain, tfds: image sources, latent cache, order of examples
    2  train/       state, optimizer, EMA, steps, loop, checkpoints, logs
       eval/        reconstruction, feature extractors, Fréchet distance, classifiers
       interop/     other libraries' weights <-> ours
    3  jobs/        one verb of the command line per file
       flags.py     the flags of each verb
    4  cli.py       the `ldm` command

Shape alphabet of comments and docstrings: B batch, H W grid, C channels, T tokens, D width,
N heads, K head size, S steps. Time: 0 is data, the end is noise.
"""

__version__ = "0.1.0"
