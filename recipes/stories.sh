#!/bin/sh
# Stories: a model of 17 M parameters that tells children's stories, from TinyStoriesChinese. Then
# it learns to tell the story that is asked for, by words (in English, as the data set has them) and
# features such as a dialogue or a bad ending.
#
#     sh recipes/stories.sh
#
# Interrupted? Run it again: it goes on where it was. Change what you like below.
# The address was not verified: it could not be reached when this was written. The learning rates of
# fine-tuning are where to begin, not a measurement.
set -e
cd "$(dirname "$0")/.."
. recipes/common.sh
DATA=data/stories OUT=out/stories TOKENIZER=data/stories/tokenizer.model
SHAPE="--dim=384 --n_layers=8 --n_heads=3"

$PYTHON recipes/cost.py $SHAPE --vocab_size=8192 --pretrain_tokens=393_000_000 \
    --sft_tokens=33_000_000 --download="about 1 GB (2.1 million stories), unverified" \
    --disk="about 10 GB"

download adam89/TinyStoriesChinese "" $DATA/raw "*.tar.gz"
mkdir -p $DATA/json
test -e $DATA/json/.complete || for file in $DATA/raw/*.tar.gz; do
    tar xzf "$file" -C $DATA/json
done
touch $DATA/json/.complete

CORPORA=tiny_stories_zh:$DATA/json
test -e $TOKENIZER || $PYTHON train_tokenizer.py --corpora=$CORPORA --out=$TOKENIZER \
    --vocab_size=8192 $TOKENIZER_ARGS
test -e $DATA/bins/meta.json || $PYTHON prepare_pretrain.py --corpora=$CORPORA \
    --tokenizer=$TOKENIZER --data_dir=$DATA/bins $PREPARE_ARGS

test -e $DATA/sft/meta.json || $PYTHON prepare_sft.py --corpora=$CORPORA \
    --tokenizer=$TOKENIZER --data_dir=$DATA/sft $PREPARE_SFT_ARGS

# 3,000 steps of 131,072 tokens: about once through the stories; then 500 of 65,536
$PYTHON pretrain.py --resume --tokenizer=$TOKENIZER --data_dir=$DATA/bins --out_dir=$OUT/pretrain \
    $SHAPE --max_steps=3000 --sample_prompts="从前|有一天，小猫|莉莉有一个红色的气球" $PRETRAIN_ARGS
$PYTHON sft.py --resume --tokenizer=$TOKENIZER --checkpoint=$OUT/pretrain/best.pt \
    --data_dir=$DATA/sft --out_dir=$OUT/sft --batch_tokens=65_536 --max_steps=500 --lr=1e-3 \
    --muon_lr=1e-3 --sample_prompts="请用这些词讲一个故事：dog、ball、happy。故事要有对话。" $SFT_ARGS

$PYTHON sample.py --checkpoint=$OUT/pretrain/best.pt --prompt=从前 --n_samples=3
$PYTHON sample.py --checkpoint=$OUT/sft/best.pt --prompt=请用这些词讲一个故事：cat、rain、sad。
