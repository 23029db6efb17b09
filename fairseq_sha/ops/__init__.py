from fairseq_sha.ops.attention import attend, attend_reference
from fairseq_sha.ops.dropout import dropout

__all__ = ["attend", "attend_reference", "dropout"]
