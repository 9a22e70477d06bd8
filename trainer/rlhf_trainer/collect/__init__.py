"""Pairs worth a person's time: the policy's own replies, chosen where the reward model knows least.

The online preference loop is this, between two policy runs:

    policy k --collect--> pairs --people--> annotations --append--> preferences k+1 --> reward model k+1 --> policy k+1
"""
