from fairseq_sha.modules.boom import Boom
from fairseq_sha.modules.cells import LSTM, QRNN, SRU, LayerNormLSTM, MinGRU, MinLSTM
from fairseq_sha.modules.feed_forward import FeedForward
from fairseq_sha.modules.ngram_embedding import NGramEmbedding
from fairseq_sha.modules.overparameterised_vector import OverparameterisedVector
from fairseq_sha.modules.single_head_attention import SingleHeadAttention

__all__ = [
    "Boom",
    "FeedForward",
    "LSTM",
    "LayerNormLSTM",
    "MinGRU",
    "MinLSTM",
    "NGramEmbedding",
    "OverparameterisedVector",
    "QRNN",
    "SRU",
    "SingleHeadAttention",
]
