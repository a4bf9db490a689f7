"""Data: seqio tasks -> tokenized cache -> Grain loader.

`cache` and `loader` need neither tensorflow nor seqio once a cache is ready; `build`,
`seqio_tasks` and `seqio_vocabulary` import both and are imported only to build one. Nothing is
imported here, so that a reader pays for what it uses.
"""
