#!/usr/bin/env bash
# Half an hour on one NVIDIA card: what only a card can show. All output goes to out/card/log.txt, too.
#
#     bash extras/card.sh                          tests, speed and memory, the demo
#     bash extras/card.sh text:my_texts            and a real run of ten minutes on these texts
#
# Every step has a time limit and may fail without ending the others.
set -u
export PYTHONUNBUFFERED=1
CORPORA=${1:-}
PYTHON=${PYTHON:-python}
OUT=out/card
mkdir -p $OUT
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee $OUT/log.txt

step() {                                       # step SECONDS COMMAND...
    echo "=== $(date +%T) ${*:2}" | tee -a $OUT/log.txt
    timeout "$@" 2>&1 | tee -a $OUT/log.txt
    [ "${PIPESTATUS[0]}" = 0 ] || echo "=== that ended with ${PIPESTATUS[0]}" | tee -a $OUT/log.txt
}

# 1. does it compute the same as the CPU?
step 900 $PYTHON -m pytest -q tests/test_cuda.py

# 2. speed, share of the card's matrix products (MFU) and memory, for the shapes of docs/training.md;
#    once with as many rows as fit this card, once with as many as fit 24 GB
for shape in "512 8 4 512" "768 12 6 512" "1024 16 8 1024" "1536 16 12 1024"; do
    read -r dim layers heads length <<< "$shape"
    flags="--dim=$dim --n_layers=$layers --n_heads=$heads --max_seq_len=$length --batch_tokens=131072"
    rows=$($PYTHON - $dim $layers $heads $length <<'PYTHON'
import sys
import torch
import runtime
from model import Model, ModelConfig
dim, layers, heads, length = map(int, sys.argv[1:])
process = runtime.Process(0, 0, 1, torch.device("cuda"))
model = Model(ModelConfig(16384, dim, layers, heads, max_seq_len=length, qk_norm=True)).cuda()
model.is_compiled = runtime.can_compile(process.device)
free = 24 * 10**9 - torch.cuda.memory_allocated()
torch.cuda.mem_get_info = lambda device: (free, free)
print(runtime.rows_that_fit(model, process, "bfloat16", 131072 // length, length))
PYTHON
)
    step 180 $PYTHON -m extras.bench --only=training $flags --out=$OUT/bench_$dim.json
    step 180 $PYTHON -m extras.bench --only=training $flags --micro_batch="$rows" --out=$OUT/bench_${dim}_24gb.json
done
step 300 $PYTHON -m extras.bench --only=generation --out=$OUT/bench_generation.json

# 3. the whole pipeline, on a small corpus
step 400 make -o .venv/demo demo PYTHON="$PYTHON"

# 4. a real run
if [ -n "$CORPORA" ]; then
    step 300 $PYTHON train_tokenizer.py --corpora="$CORPORA" --out=$OUT/tokenizer.model --vocab_size=8192
    step 300 $PYTHON prepare_pretrain.py --corpora="$CORPORA" --tokenizer=$OUT/tokenizer.model --data_dir=$OUT/data
    # SIGTERM after ten minutes: the run saves, and best.pt is the last validation
    step 600 $PYTHON pretrain.py --tokenizer=$OUT/tokenizer.model --data_dir=$OUT/data --out_dir=$OUT/run \
        --batch_tokens=65536 --epochs=8 --eval_interval=100 --overwrite
    for prompt in 从前 今天 人工智能 唐朝; do
        step 60 $PYTHON sample.py --checkpoint=$OUT/run/best.pt --prompt=$prompt
    done
fi
echo "all of it: $OUT/log.txt"
