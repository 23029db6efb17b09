"""Options of ``fairseq-train`` for a tiny model of each family, which learns something at once."""

SHA_RNN = """
    --arch sha_rnn_small --width 16 --num-layers 2 --attention-layers 1 --window 60
    --tokens-per-sample 40 --random-segment-lengths --batch-size 4 --num-workers 0
    --optimizer min_trust_lamb --min-trust 0.25 --lr 0.01 --warmup-updates 5 --clip-norm 0.25
    --criterion cross_entropy --log-interval 1 --log-format simple --cpu
"""
COMMON = """
    --width 16 --num-layers 2 --dropout 0.1
    --tokens-per-sample 40 --random-segment-lengths --batch-size 4 --num-workers 0
    --log-interval 1 --log-format simple --cpu --save-interval-updates 7 --no-epoch-checkpoints
"""
FAMILIES = {
    "SHARNN": SHA_RNN,
    "TransformerXL": f"""{COMMON} --arch transformer_xl --n-head 2 --d-inner 32 --mem-len 60
        --optimizer adam --lr 0.01 --lr-scheduler cosine --clip-norm 0.25""",
    "AdaptiveSpan": f"""{COMMON} --arch adaptive_span --n-head 2 --d-inner 32
        --attn-span 100 --adapt-span-ramp 8 --adapt-span-init 0 --adapt-span-loss 1e-2
        --optimizer clipped_adagrad --lr 0.07 --warmup-updates 5
        --criterion cross_entropy_with_auxiliary_losses""",
    "SRUpp": f"""{COMMON} --arch srupp --projection 8 --attn-every-n-layers 2 --eval-unroll 40
        --optimizer radam --weight-decay 0.1 --lr 0.2 --warmup-updates 5 --clip-norm 1.0""",
    "MinRNN": f"""{COMMON} --arch min_rnn --cell min_lstm --d-inner 32
        --optimizer adam --lr 0.03 --lr-scheduler cosine --clip-norm 1.0""",
}
