"""Whatever a reply earned, it earns less for each hundred tokens past the first two hundred."""

FREE = 200  # tokens
PENALTY = 0.1  # for each further hundred


def combine_rewards(trace, rewards):
    if not rewards:
        return None  # nobody has an opinion, so it stays unscored
    said = [reward.value for reward in rewards if reward.source == "feedback"]
    if said:
        return said[0]  # what someone said explicitly is left alone
    weight = sum(reward.confidence for reward in rewards)
    earned = sum(reward.value * reward.confidence for reward in rewards) / weight
    over = max(0, len(trace.response_token_ids or ()) - FREE)
    return max(-1.0, earned - PENALTY * over / 100)
