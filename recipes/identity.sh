#!/bin/sh
# Identity: teach a chat model who it is, from 90 questions about itself.
#
#     NAME=小禾 MAKER=李明 CHECKPOINT=out/sft/best.pt KEEP=data/chat.jsonl sh recipes/identity.sh
#
# KEEP is a file of {"messages": [...]} a line with dialogues that the model learnt before. 900 of
# them are learnt again beside the new ones, or the model forgets: docs/recipes.md has the figures.
set -e
cd "$(dirname "$0")/.."
. recipes/common.sh
NAME=${NAME:-小禾} MAKER=${MAKER:-李明} CHECKPOINT=${CHECKPOINT:-out/sft/best.pt}
TOKENIZER=${TOKENIZER:-data/tokenizer.model} KEEP=${KEEP:-data/demo/chat.jsonl}
DATA=data/identity OUT=out/identity

echo "download    none; the checkpoint is $CHECKPOINT"
echo "time        about 120 steps of 1,024 tokens: seconds on a card, computed; about a minute for"
echo "            the demo's model on a CPU. sft.py says more before its first step"

mkdir -p $DATA
$PYTHON data/make_identity.py --name="$NAME" --maker="$MAKER" --out=$DATA/identity.jsonl
head -n 900 "$KEEP" > $DATA/keep.jsonl
$PYTHON prepare_sft.py --corpora=messages:$DATA/identity.jsonl,messages:$DATA/keep.jsonl \
    --tokenizer=$TOKENIZER --data_dir=$DATA/sft --val_fraction=0.05 --test_fraction=0 \
    $PREPARE_SFT_ARGS

ask() { $PYTHON sample.py --checkpoint=$1 --prompt=你是谁？ --temperature=0; }
echo "before:"
ask $CHECKPOINT
$PYTHON sft.py --overwrite --tokenizer=$TOKENIZER --checkpoint=$CHECKPOINT --data_dir=$DATA/sft \
    --out_dir=$OUT --batch_tokens=1024 --epochs=4 --lr=5e-4 --muon_lr=5e-4 \
    --sample_prompts="你是谁？|你叫什么名字？|请问你是哪一位？|谁创造了你？" $SFT_ARGS
echo "after:"
ask $OUT/best.pt
