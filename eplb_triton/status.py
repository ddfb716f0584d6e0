"""What a plan says of a row that did not come out as asked: values of `Placement.bad`, written where the plan is made.

Besides them a row names the lowest expert whose load was NaN, negative or above 2**100 and counted as 0.
"""

GOOD = -1
NO_ROOM = -2  # an expert has more replicas than log2phy has room for; those ranked behind are left out of it
