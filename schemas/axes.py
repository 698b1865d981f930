"""The legend of axis letters that every docstring in pvrpipe uses.

=========  ====================================================================
letter     meaning
=========  ====================================================================
``B``      batch: windows drawn together
``T``      time: consecutive rows of one episode
``L``      transitions of an episode; an episode has L + 1 rows
``N``      rows of a shard or a store
``D``      width of an embedding
``K``      tokens of an embedding
``A``      width of an action
``S``      width of the state (what the environment observes of its physics)
``P``      width of the full physics state (enough to restore the simulator)
``H W C``  height, width and channels of a frame
=========  ====================================================================

Row t of an episode (the convention of dm_env and DreamerV3):

==================  ==================================================================
column              meaning
==================  ==================================================================
``frame[t]``        what was observed at t, uint8 (H, W, C)
``embedding[t]``    the same observation through a frozen encoder, (D,) or (K, D)
``reward[t]``       the reward received **on arriving** at t; 0 in the first row
``action[t]``       the action taken **from** t; zeros in the last row
``is_first[t]``     t is the first row of its episode
``is_last[t]``      t is the last row of its episode
``is_terminal[t]``  the environment truly ended at t (not: time ran out)
``state[t]``        the physics observation at t; for probing
``physics[t]``      the full physics state at t; for rendering again
``episode[t]``      number of the episode, int32
``step[t]``         number of the row within its episode, int32
==================  ==================================================================
"""
