"""Fine-tune a small model on conversations to say what a larger one, its teacher, would say at every token.

python train_distill.py --teacher out/full_sft_768                  starts from out/pretrain_512
torchrun --nproc_per_node 2 train_distill.py --teacher out/full_sft_768 --dim 512 --distill_loss jsd --use_wandb
python train_distill.py --teacher out/full_sft_768 --on_policy --init_from full_sft_512      on answers of its own
"""

from training import DistillConfig, run_stage


def main(asked: DistillConfig) -> None:
    # imported once the flags are checked: torch takes seconds, and neither --help nor a wrong flag needs it
    from training import Distillation, build_engine, train
    from training.rollout import plain_rollouts
    from training.setup import load_data, run_identity, start_machine, starting_model, starting_teacher
    from training.top_k import fill_top_k

    # 1. Processes, device, precision
    machine = start_machine(asked)

    # 2. Tokenizer and model, those of the pretrained folder; and the frozen model to learn from
    start = starting_model(asked)
    teacher = starting_teacher(start, machine)

    # 3. Data: conversations, as in supervised fine-tuning; of drawn answers, their prompts
    data = load_data(start, machine)

    # 4. What is optimised: how far the student is from its teacher, where the assistant speaks
    objective = Distillation(asked.distill_loss, asked.jsd_beta, asked.distill_temperature, asked.ce_weight, teacher)

    # 5. How it is spread
    identity = run_identity(start, data) | {"teacher": teacher.identity}
    engine = build_engine(start.model, start.config, machine, start.weights)

    # 6. Where only the teacher's likeliest tokens are wanted: those, of the rows this run comes to, cached
    if asked.teacher_top_k:
        for loader in data.parts:
            fill_top_k(loader, teacher, engine, start.config)

    # 7. Whose answers are learnt from: the data's, or the student's own to its prompts, of every update anew
    source = plain_rollouts(data, engine, start) if asked.on_policy else data

    # 8. Train, and leave a Hugging Face model folder
    train(engine, objective, source.train, source.val, start, identity)


if __name__ == "__main__":
    run_stage(main, DistillConfig)
