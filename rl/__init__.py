"""From prompt to policy update: rollouts, rewards, advantages and objectives of alignment."""
