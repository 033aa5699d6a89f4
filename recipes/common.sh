# What the recipes share. It is sourced by them, not run.
PYTHON=${PYTHON:-python}    # the one with the packages of requirements.txt
HUB=${HUB:-hf}              # hf: huggingface.co or its mirror in $HF_ENDPOINT; modelscope

# download NAME NAME_ON_MODELSCOPE FOLDER FILES...: once; what is half there is continued.
download() {
    hf_name=$1 modelscope_name=$2 folder=$3
    shift 3
    test ! -e "$folder/.complete" || return 0
    command -v "$HUB" >/dev/null || {
        echo "$HUB: not installed; pip install huggingface_hub, or modelscope with HUB=modelscope"
        exit 1
    }
    if [ "$HUB" = modelscope ] && [ ! "$modelscope_name" ]; then
        echo "$hf_name: no copy on ModelScope is known; without HUB=modelscope, and in China with"
        echo "HF_ENDPOINT=https://hf-mirror.com, it comes from a mirror of huggingface.co"
        exit 1
    fi
    for files in "$@"; do    # one call each: some versions take a single pattern
        if [ "$HUB" = modelscope ]; then
            modelscope download --dataset "$modelscope_name" --local_dir "$folder" \
                --include "$files"
        else
            hf download --repo-type dataset "$hf_name" --local-dir "$folder" --include "$files"
        fi
    done
    touch "$folder/.complete"
}
