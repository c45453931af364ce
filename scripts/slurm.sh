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

cd "$CODE" || exit 1
# Tasks are found through Slurm's variables; a dead one ends the others within seconds.
srun --kill-on-bad-exit=0 .venv/bin/python train.py \
    --config=configs/vit_b32_laion400m.py --workdir="$WORKDIR" \
    --config.data.name="$SHARDS" --config.data.caption_key=caption
code=$?

# 75: it was told to stop and has saved. 76: a peer was lost. Others die by signals, 128 and above.
if [ "$code" -eq 75 ] || [ "$code" -eq 76 ] || [ "$code" -ge 128 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
