"""The real engine: the serving rules of the simulator, run on a real model and a real clock.

hw_engine        ``HwEngine``, which others import
torch_executor   runs the replica's decisions on the model
sampling         ``Sampling``: temperature, top_p and seed of a request
clock            ``RealClock``: wall-clock or processor seconds
prompts          token ids for the requests of a trace
iteration_log    what each iteration computed, and its memory
"""
