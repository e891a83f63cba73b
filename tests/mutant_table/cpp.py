"""Breaks of the algebra in C++."""

from .mutant import CASES, CPU, STAGES_IN_CPP, Mutant, cpu

MUTANTS = [
    cpu(
        "a segment ends a row late",
        "exists[static_cast<std::size_t>(begin - 1)] = 0",
        "exists[static_cast<std::size_t>(begin)] = 0",
        "ends of segments",
    ),
    cpu(
        "a position may stay",
        "position[i + 1] == position[i] + 1",
        "position[i + 1] == position[i]",
        "positions",
    ),
    cpu(
        "where is not looked at",
        "&& (!given.where || given.where[i])",
        "",
        "where",
    ),
    cpu(
        "the neighbour is lost",
        "const bool onto = i > 0 && rows.kind[i - 1] == bootstrap;",
        "const bool onto = i > 0 && rows.kind[i] == bootstrap;",
        "plain TD rows",
    ),
    cpu(
        "a gamma is lost in beta",
        "beta += 2 * gamma * gamma * d",
        "beta += 2 * gamma * d",
        "plain TD rows",
    ),
    cpu(
        "z_loss is lost in beta",
        "beta = 2 * call.terms.z_loss * loss.mle[i]",
        "beta = 0",
        "z_loss",
    ),
    cpu(
        "the gradient from above is ignored",
        "call.above[i] * share(",
        "share(",
        "plain TD rows",
        "none",
    ),
    cpu(
        "a truncated row has no TD term",
        "call.sequence.truncated(i, call.length)) return onward;",
        "call.sequence.truncated(i, call.length)) return no_td;",
        "truncated, by row",
    ),
    cpu(
        "the label's element goes by a soft cap",
        "done.element.data(), stats.label_logit.data(), readout);",
        "done.element.data());",
        "scaled and capped",
    ),
    cpu(
        "the neighbour's weight is the row's own",
        "const double d = loss.td[i - 1];",
        "const double d = loss.td[i];",
        "weights, int32 labels",
    ),
    cpu(
        "alpha takes the row's own label",
        "masked(d, label_logit[i - 1])",
        "masked(d, label_logit[i])",
        "plain TD rows",
    ),
    cpu(
        "detach_next lost for logits",
        "onto && !heads.next_values && !heads.detach_next",
        "onto && !heads.next_values",
        "detached",
    ),
    cpu(
        "detach_next lost for values",
        "back = rows.kind[i] == bootstrap && !call.heads.detach_next ?",
        "back = rows.kind[i] == bootstrap ?",
        "values, detached",
    ),
    cpu(
        "a value's gradient through next values",
        "(call.heads.next_values ? 0.0 : back)",
        "(back)",
        "values and next values",
    ),
    cpu(
        "delta without log pi with values",
        "heads.values ? heads.values[i] + done.logprob[i] : q",
        "heads.values ? heads.values[i] : q",
        "values",
    ),
    cpu(
        "the agent's rows have the expert's TD weight",
        "(of_expert ? terms.td[i] : terms.agent_td[i])",
        "terms.td[i]",
        "experts and agents",
    ),
    cpu(
        "the agent's rows have an MLE term",
        "of_expert ? terms.mle[i] * part : 0.0",
        "terms.mle[i] * part",
        "experts and agents",
    ),
    cpu(
        "the agent's rows are averaged over the expert's",
        "share(weight(i), of_expert ? experts : agents)",
        "share(weight(i), experts)",
        "experts and agents, items",
    ),
    cpu(
        "a weight of 0 times inf",
        "loss.td[i] * masked(loss.td[i], reward * reward)",
        "loss.td[i] * reward * reward",
        "garbage of weight 0",
    ),
    Mutant(
        "C++: the mean reward counts rows without a TD term",
        CPU,
        "*sum /= std::max(with_td, 1.0)",
        "*sum /= std::max(sums.tokens, 1.0)",
        STAGES_IN_CPP,
    ),
    Mutant(
        "C++: a next value is taken from a row behind the last",
        CPU,
        "if (kind == bootstrap)\n      done.next_value[i] =",
        "if (has_td(kind))\n      done.next_value[i] =",
        STAGES_IN_CPP,
    ),
    Mutant(
        # In double p (A + ...) + C is as exact as expm1: the sum 1 + exp, rounded to double, rules.
        "C++: a confident row's p is rounded",
        CPU,
        "a * std::expm1(logprob) + (a + c) +",
        "a * static_cast<float>(std::exp(logprob)) + c +",
        f"{CASES}test_a_confident_row_in_torch[native]",
    ),
]
