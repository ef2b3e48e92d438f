"""Reinforce what a chat model does well, beside a critic of its own that says of every token what was to be expected.

python train_ppo.py --reward world                                  starts from out/full_sft_512
torchrun --nproc_per_node 2 train_ppo.py --data_path prompts.jsonl --reward reward_model:out/reward_512
"""

from training import PPOConfig, run_stage


def main(asked: PPOConfig) -> None:
    # imported once the flags are checked: torch takes seconds, and neither --help nor a wrong flag needs it
    from training import train
    from training.objectives import ppo_of
    from training.setup import load_data, run_identity, start_machine, starting_model
    from training.valued import actor_critic, starting_critic, valued_rollouts

    # 1. Processes, device, precision
    machine = start_machine(asked)

    # 2. Tokenizer and model, those of the fine-tuned folder; and the critic, of the same or of a reward model
    start = starting_model(asked)
    critic = starting_critic(start)

    # 3. Data: conversations without their last answer
    data = load_data(start, machine)

    # 4. What is optimised: the advantage of every drawn token, clipped; and the critic's error
    objective = ppo_of(asked)

    # 5. How they are spread: both alike
    identity = run_identity(start, data) | {"critic": critic.identity}
    engine = actor_critic(start, critic, machine)

    # 6. Rollouts: the model's answers to the prompts, judged by --reward, and their values; of every update anew
    rollouts = valued_rollouts(data, engine, start, objective)

    # 7. Train, and leave a Hugging Face model folder
    train(engine, objective, rollouts.train, rollouts.val, start, identity)


if __name__ == "__main__":
    run_stage(main, PPOConfig)
