#!/bin/sh
# Chat: a model of 65 M parameters that answers, from minimind's public data set.
#
#     sh recipes/chat.sh                      from huggingface.co
#     HUB=modelscope sh recipes/chat.sh       from modelscope.cn
#
# Interrupted? Run it again: it goes on where it was. Change what you like below. For the large
# variant take pretrain_t2t.jsonl (10 GB) and sft_t2t.jsonl (14 GB), and as many more steps.
# The addresses were not verified: they could not be reached when this was written. Sizes are those
# of minimind's README. The learning rates of fine-tuning are where to begin, not a measurement.
set -e
cd "$(dirname "$0")/.."
. recipes/common.sh
DATA=data/chat OUT=out/chat TOKENIZER=data/chat/tokenizer.model
SHAPE="--dim=640 --n_layers=12 --n_heads=5"

$PYTHON recipes/cost.py $SHAPE --vocab_size=8192 --pretrain_tokens=314_000_000 \
    --sft_tokens=196_000_000 --download="2.9 GB" --disk="about 8 GB"

download jingyaogong/minimind_dataset gongjy/minimind_dataset $DATA/raw \
    pretrain_t2t_mini.jsonl sft_t2t_mini.jsonl dpo.jsonl

TEXT=minimind:$DATA/raw/pretrain_t2t_mini.jsonl CHAT=minimind:$DATA/raw/sft_t2t_mini.jsonl
PAIRS=minimind_dpo:$DATA/raw/dpo.jsonl
# the tokenizer takes "minimind" for the texts; its dialogues have ShareGPT's form
test -e $TOKENIZER || $PYTHON train_tokenizer.py --out=$TOKENIZER \
    --corpora=$TEXT,sharegpt:$DATA/raw/sft_t2t_mini.jsonl \
    --vocab_size=8192 $TOKENIZER_ARGS
test -e $DATA/bins/meta.json || $PYTHON prepare_pretrain.py --corpora=$TEXT \
    --tokenizer=$TOKENIZER --data_dir=$DATA/bins $PREPARE_ARGS
test -e $DATA/sft/meta.json || $PYTHON prepare_sft.py --corpora=$CHAT \
    --tokenizer=$TOKENIZER --data_dir=$DATA/sft $PREPARE_SFT_ARGS
test -e $DATA/dpo/meta.json || $PYTHON prepare_sft.py --corpora=$PAIRS \
    --tokenizer=$TOKENIZER --data_dir=$DATA/dpo $PREPARE_SFT_ARGS

# 2,400 steps of 131,072 tokens: about once through the texts; 3,000 of 65,536: half the dialogues
$PYTHON pretrain.py --resume --tokenizer=$TOKENIZER --data_dir=$DATA/bins --out_dir=$OUT/pretrain \
    $SHAPE --max_steps=2400 $PRETRAIN_ARGS
$PYTHON sft.py --resume --tokenizer=$TOKENIZER --checkpoint=$OUT/pretrain/best.pt \
    --data_dir=$DATA/sft --out_dir=$OUT/sft --batch_tokens=65_536 --max_steps=3000 --lr=1e-3 \
    --muon_lr=1e-3 $SFT_ARGS
# what people prefer: $OUT/dpo is a chat model, too. Compare the two before you keep it.
$PYTHON dpo.py --resume --tokenizer=$TOKENIZER --checkpoint=$OUT/sft/best.pt \
    --data_dir=$DATA/dpo --out_dir=$OUT/dpo $DPO_ARGS

$PYTHON eval_bleu.py --checkpoint=$OUT/sft/best.pt --questions=$DATA/sft/test.jsonl $BLEU_ARGS
# the files of C-Eval, if you put them there: see docs/models.md
test ! -d data/ceval || $PYTHON -m extras.exams --checkpoint=$OUT/sft/best.pt --data_dir=data/ceval
$PYTHON -m extras.report --pretrain_dir=$OUT/pretrain --sft_dir=$OUT/sft
$PYTHON -m extras.export --checkpoint=$OUT/sft/best.pt --out=$OUT/model.gguf --dtype=q8_0 ||
    echo "no GGUF file was made; everything else is there"
echo "talk to it: $PYTHON sample.py --checkpoint=$OUT/sft/best.pt"
