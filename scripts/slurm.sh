#!/bin/bash
# ViT-B/32 on 8 nodes of 8 GPUs, one task per node. Edit the paths, then: sbatch scripts/slurm.sh
#SBATCH --job-name=disco-jax
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
# Two minutes before the time limit, every task gets a signal: it saves and exits with code 75.
#SBATCH --signal=USR1@120
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append

# Folders on a file system shared by all nodes.
CODE=$HOME/disco-jax
WORKDIR=/scratch/$USER/runs/vit_b32_laion400m
SHARDS='/scratch/laion400m/{00000..41407}.tar'

newest_checkpoint() { # a complete checkpoint's name is only its step
    find "$WORKDIR/checkpoints" -maxdepth 1 -regex '.*/[0-9]+' -printf '%f\n' 2>/dev/null | sort -n | tail -1
}

cd "$CODE" && mkdir -p "$WORKDIR" || exit 1
before=$(newest_checkpoint)
# The tasks find each other through Slurm's environment variables. If one dies, the others exit
# within seconds. srun does not inherit --cpus-per-task from the batch job.
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/python train.py \
    --config=vit_b32_laion400m --workdir="$WORKDIR" \
    --config.data.name="$SHARDS" --config.data.caption_key=caption
code=$?

# 75: asked to stop, and saved. 0: done. 2: a user error, which a restart does not fix. Any other
# code, e.g. a lost process (76) or a signal (128 and above), is retried, at most three times in a
# row without a new checkpoint.
again=no
case $code in
    75) again=yes tries=0 ;;
    0 | 2) ;;
    *)
        tries=$(($(cat "$WORKDIR/tries" 2>/dev/null || echo 0) + 1))
        [ "$(newest_checkpoint)" = "$before" ] || tries=1
        [ "$tries" -gt 3 ] || again=yes
        ;;
esac
if [ $again = yes ]; then
    echo "$tries" >"$WORKDIR/tries"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
