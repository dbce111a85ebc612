"""Go or no-go for PPO: the thresholds, each with its reason.

They ask whether PPO against this model would do harm, not whether the model is good. None of them
was chosen by a result.
"""

# Two standard errors: a model that guesses passes once in forty times.
STANDARD_ERRORS = 2.0
# Certain of every pair and right in three of four: its large differences are noise by half, and
# PPO climbs just those. On top of what chance shows in so few pairs. (Scale alone does no harm: PPO
# takes scores in units of their spread.)
CALIBRATION_ERROR = 0.25
# In the mean distance of a better answer from a worse one: where spam gains more than that, saying
# the same with spam pays more than saying something better.
SPAM_MARGINS = 1.0
# In score's units; it moves no preference by more than 0.0025. Beyond rounding a score must not
# depend on the answers it is scored beside.
PADDING_DIFFERENCE = 0.01
DIVERGED = "its scores are not numbers: training diverged, a lower learning_rate may not"


def reasons_against(figures: dict[str, float], pairs: int) -> list[str]:
    """Why PPO should not follow this reward model; empty where nothing speaks against it.

    Args:
        figures: the summary's.
        pairs: how many the accuracy was measured on.
    """
    reasons = []
    beyond = 0.5 + STANDARD_ERRORS * figures["accuracy_chance_error"]
    if figures["accuracy"] <= beyond:
        cure = f"above {beyond:.3f} it could" if beyond < 1 else "no accuracy of so few could"
        reasons.append(
            f"accuracy {figures['accuracy']:.3f} on {pairs} held-out pairs cannot be told from "
            f"chance: {cure}"
        )
    allowed = CALIBRATION_ERROR + figures["calibration_error_by_chance"]
    too_sure = figures["overconfidence_as_trained"]
    if too_sure > allowed:
        reasons.append(
            f"overconfidence {too_sure:.3f}, as trained, is above {allowed:.3f}: "
            "it is sure without being right"
        )
    if figures["margin"] <= 0:
        reasons.append(
            f"margin {figures['margin']:.2f}: the worse answers score higher in the mean"
        )
    for name, change in figures.items():
        if name.startswith("spam_") and change > SPAM_MARGINS * figures["margin"] > 0:
            reasons.append(
                f"{name.removeprefix('spam_').replace('_', ' ')} raises the score by {change:.2f}, "
                f"more than a better answer does (margin {figures['margin']:.2f})"
            )
    longer, count = figures["accuracy_longer_worse"], int(figures["pairs_longer_worse"])
    if count and longer < 0.5 - STANDARD_ERRORS * figures["accuracy_longer_worse_chance_error"]:
        reasons.append(
            f"of {count} pairs whose longer answer is worse it ranks {longer:.3f} right: "
            "it prefers the longer one"
        )
    if figures["padding_difference"] > PADDING_DIFFERENCE:
        reasons.append(
            f"scores differ by {figures['padding_difference']:.3f} with the batch they are in, "
            f"more than {PADDING_DIFFERENCE}"
        )
    return reasons
