"""Search and transfer with the reference divided among processes."""

from ttsr_fast.distributed.sharded import Shard, gather_fold_sharded, search_sharded, shard_rows

__all__ = ["Shard", "gather_fold_sharded", "search_sharded", "shard_rows"]
