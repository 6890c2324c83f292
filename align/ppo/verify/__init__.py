"""What proves PPO right: the maths against numbers known from elsewhere, and the loop on the user's own model."""
