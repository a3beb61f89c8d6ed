"""ldm_jax: latent diffusion models in JAX, from raw images to samples and metrics.

Floors; a module imports only from lower ones (`tests/test_floors.py` checks it):

    0  errors.py keys.py        input errors; named randomness
       options.py               flags from dataclasses
       sharding.py files.py     meshes; what is read and written
    1  diffusion/               arrays and callables: processes, objectives, guidance, samplers
       models/                  parameters: config, init, apply, axes
       data/                    numpy, grain, tfds: fields, sources, records, order of examples
    2  train/                   state, step, optimizer, averages, checkpoints, loop, hooks, logs
       interop/                 other libraries' weights <-> ours
    3  eval/                    extractors, metrics, protocols, references, judges
    4  runs/                    settings, config files, workdirs, trained models
    5  sampling/                options, inputs, program, draw
    6  jobs/                    one verb of the command line per file
    7  cli.py                   the `ldm` command

Shape alphabet of comments and docstrings: B batch, H W grid, C channels, T tokens, D width,
N heads, K head size, S steps. Time: 0 is data, the end is noise.
"""

__version__ = "0.1.0"
