"""Reinforcement learning: the model answers prompts in groups, answers are judged, and the better ones become likelier.

python train_grpo.py --reward world                                 starts from out/full_sft_512
torchrun --nproc_per_node 2 train_grpo.py --data_path prompts.jsonl --reward number format --reward_weights 1 0.5
"""

from training import GRPOConfig, run_stage


def main(asked: GRPOConfig) -> None:
    # imported once the flags are checked: torch takes seconds, and neither --help nor a wrong flag needs it
    from training import build_engine, train
    from training.objectives import policy_of
    from training.rollout import judged_rollouts
    from training.setup import load_data, run_identity, start_machine, starting_model

    # 1. Processes, device, precision
    machine = start_machine(asked)

    # 2. Tokenizer and model: those of the fine-tuned folder
    start = starting_model(asked)

    # 3. Data: conversations without their last answer
    data = load_data(start, machine)

    # 4. What is optimised: the advantage of an answer over the others to its prompt
    objective = policy_of(asked)

    # 5. How it is spread
    identity = run_identity(start, data)
    engine = build_engine(start.model, start.config, machine, start.weights)

    # 6. Rollouts: the model's answers to the prompts, judged by --reward; of every update anew
    rollouts = judged_rollouts(data, engine, start)

    # 7. Train, and leave a Hugging Face model folder
    train(engine, objective, rollouts.train, rollouts.val, start, identity)


if __name__ == "__main__":
    run_stage(main, GRPOConfig)
