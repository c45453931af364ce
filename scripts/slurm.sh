#!/bin/bash
# ViT-B/32 on 8 nodes of 8 GPUs, one task a node. Change the names, then: sbatch scripts/slurm.sh
#SBATCH --job-name=disco-jax
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
# Two minutes before the time is up, every task is told: it saves and ends with code 75.
#SBATCH --signal=USR1@120
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append

# Folders that all nodes see.
CODE=$HOME/disco-jax
WORKDIR=/scratch/$USER/runs/vit_b32_laion400m
SHARDS='/scratch/laion400m/{00000..41407}.tar'

newest_checkpoint() { # complete ones are named by their step alone
    find "$WORKDIR/checkpoints" -maxdepth 1 -regex '.*/[0-9]+' -printf '%f\n' 2>/dev/null | sort -n | tail -1
}

cd "$CODE" && mkdir -p "$WORKDIR" || exit 1
before=$(newest_checkpoint)
# Tasks are found through Slurm's variables; a dead one ends the others within seconds. srun does not
# take --cpus-per-task from the batch job.
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" .venv/bin/python train.py \
    --config=configs/vit_b32_laion400m.py --workdir="$WORKDIR" \
    --config.data.name="$SHARDS" --config.data.caption_key=caption
code=$?

# 75: it was asked to stop and has saved. 0: done. 2: a mistake, which starting again does not mend.
# Whatever else, a lost process (76) or a signal (128 and above) say, is tried again, but not a
# fourth time in a row without a new checkpoint.
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
