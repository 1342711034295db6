"""What each block, precision and KV choice of a real model loses in quality.

    run, job                                 the command, its configuration, and one measurement
    orders, losses                           the kinds of measurement: orders of blocks or layers; losses of plans
    gsi, one_shot, cosine, lis, pdtrim       the scores of the papers
    offline_search, offline_search_page      GSI next to searches over whole masks, and the page of that
    policy_gradient, evolution               these searches
    mask_search, mask_nll                    their budget, and the loss of many masks at once
    quality_table, fit                       measures the quality table, and fits the quality model to it
    kv_bits                                  what KV at 8 and 4 bits costs
    full_test                                selected plans on the full test text, and greedy decoding
    nll, text                                the loss of a plan on text, and that text
    candidate_states, loss_bound             shared hidden states and bounds that make GSI faster
    block_numbers                            blocks by number
    report                                   the page of scores

Others import ``nll`` and ``text`` to measure losses, and ``full_test.greedy_tokens``.
"""
