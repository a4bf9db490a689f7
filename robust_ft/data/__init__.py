"""Data: seqio tasks -> tokenized cache -> Grain loader.

`cache` and `loader` need neither tensorflow nor seqio once a cache is ready; `build` imports both,
and is imported only to build one. Nothing is imported here, so that importing one module of the
package costs no more than that module.
"""
