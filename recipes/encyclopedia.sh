#!/bin/sh
# Encyclopedia: 98 M or 219 M parameters from Chinese Wikipedia, Baidu Baike and medical texts,
# fine-tuned on BELLE and medical questions: the data sets of baby-llama2-chinese.
#
#     sh recipes/encyclopedia.sh              98 M parameters
#     SIZE=219 sh recipes/encyclopedia.sh     219 M parameters
#
# Interrupted? Run it again: it goes on where it was. Change what you like below.
# The addresses were not verified: they could not be reached when this was written. The learning
# rates of fine-tuning are where to begin, not a measurement.
set -e
cd "$(dirname "$0")/.."
. recipes/common.sh
DATA=data/encyclopedia OUT=out/encyclopedia${SIZE:-98} TOKENIZER=data/encyclopedia/tokenizer.model
if [ "${SIZE:-98}" = 219 ]; then
    SHAPE="--dim=1024 --n_layers=16 --n_heads=8" STEPS=33000
else
    SHAPE="--dim=768 --n_layers=12 --n_heads=6" STEPS=15000
fi

# 20 tokens for each parameter: steps of 131,072 tokens
$PYTHON recipes/cost.py $SHAPE --pretrain_tokens=$((STEPS * 131072)) --sft_tokens=196_000_000 \
    --download="about 10 GB, unverified" --disk="about 40 GB"

download pleisto/wikipedia-cn-20230720-filtered "" $DATA/wikipedia "*.json"
download xuqinyang/BaiduBaike-5.63M "" $DATA/baidubaike "*.json*"
download shibing624/medical "" $DATA/medical "pretrain/*" "finetune/*"
download BelleGroup/train_1M_CN "" $DATA/belle "*.json*"

TEXT=wikipedia_cn:$DATA/wikipedia,baidubaike:$DATA/baidubaike,medical:$DATA/medical/pretrain
CHAT=belle:$DATA/belle,medical_qa:$DATA/medical/finetune
test -e $TOKENIZER || $PYTHON train_tokenizer.py --corpora=$TEXT --out=$TOKENIZER $TOKENIZER_ARGS
test -e $DATA/bins/meta.json || $PYTHON prepare_pretrain.py --corpora=$TEXT \
    --tokenizer=$TOKENIZER --data_dir=$DATA/bins $PREPARE_ARGS
test -e $DATA/sft/meta.json || $PYTHON prepare_sft.py --corpora=$CHAT \
    --tokenizer=$TOKENIZER --data_dir=$DATA/sft $PREPARE_SFT_ARGS

$PYTHON pretrain.py --resume --tokenizer=$TOKENIZER --data_dir=$DATA/bins --out_dir=$OUT/pretrain \
    $SHAPE --max_steps=$STEPS $PRETRAIN_ARGS
$PYTHON sft.py --resume --tokenizer=$TOKENIZER --checkpoint=$OUT/pretrain/best.pt \
    --data_dir=$DATA/sft --out_dir=$OUT/sft --batch_tokens=65_536 --max_steps=3000 --lr=1e-3 \
    --muon_lr=1e-3 $SFT_ARGS

$PYTHON eval_bleu.py --checkpoint=$OUT/sft/best.pt --questions=$DATA/sft/test.jsonl $BLEU_ARGS
echo "talk to it: $PYTHON sample.py --checkpoint=$OUT/sft/best.pt"
