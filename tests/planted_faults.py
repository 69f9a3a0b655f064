"""Plants faults in the library one at a time, and lists those that the tests do not see.

    python -m tests.planted_faults                 all of them
    python -m tests.planted_faults --only NAME     one again
    python -m tests.planted_faults --sample 10 --seed 3

A fault is a piece of text that occurs exactly once in the library, what it is replaced with, and the tests that must
then fail. Each is planted in a copy of the tree. It is *caught* if a test fails, and *survives* if all pass. It is
*invalid* if it says nothing about the tests: its text is not there, or there twice; the tests fail without it, cannot
be collected, or are all skipped here; the planted code does not even run, or nothing came of it in time. The exit
status is the number of those not caught.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("sparse_rtrl", "triton_kernels")
LEFT_OUT = (".git", ".venv*", "runs", "build", "dist", "*.egg-info", ".*_cache", ".hypothesis", ".benchmarks")
TIME_LIMIT = 120.0
"""Seconds that the tests of one fault may take."""
SETTINGS = {"OMP_NUM_THREADS": "1", "COLUMNS": "400", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
"""One thread, lines that are not cut, and no plugins, whose start takes longer than most of the tests."""
NO_FAULTS = ("ImportError", "ModuleNotFoundError", "NameError", "SyntaxError", "IndentationError", "UnboundLocalError")
"""What planted code that does not run raises; any test would see it."""


class Fault(NamedTuple):
    """A fault, and the tests that must see it: ids as pytest takes them, a function with or without parameters."""

    name: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]


ENGINE = [
    Fault(
        "stale_weight",
        "the copies of a tape's matrices are kept when the parameters change",
        "if not kind.weights or not all(map(torch.equal, kind.weights, weights)):",
        "if not kind.weights:",
        ("tests/learners/test_carry_edges.py::test_updates_that_bump_no_version_counter",),
    ),
    Fault(
        "weight_not_copied",
        "the weight of a captured step is the parameter's own memory, which the optimizer changes",
        "return [value.clone(memory_format=torch.contiguous_format) for value in found]",
        "return list(found)",
        (
            "tests/capture/test_row_tape.py::test_weights_are_those_of_the_step_although_the_optimizer_changes_them_in_place",
        ),
    ),
    Fault(
        "stale_fused_weights",
        "the fused pass keeps its first copies of the weights",
        "if not self._copied or not all(map(torch.equal, weights, self._copied)):",
        "if not self._copied:",
        ("tests/capture/test_slot_moe_pass.py::test_agrees_with_the_general_capture_while_parameters_move",),
    ),
    Fault(
        "dropped_use",
        "of several uses of a parameter only the last one counts",
        "            uses.append(use)\n    return uses",
        "            uses = [use]\n    return uses",
        ("tests/capture/test_carry_capture.py::test_captured_as_factors_and_exact",),
    ),
    Fault(
        "dropped_term_of_a_step",
        "of the terms of a captured step the last one is lost on the way back",
        "for term in self.core.terms:\n",
        "for term in self.core.terms[:-1]:\n",
        (
            "tests/capture/test_jacobian.py::test_every_entry_of_a_step",
            "tests/learners/test_gradient.py::test_gradient_at_every_token",
        ),
    ),
    Fault(
        "missed_coupling",
        "streams that influence each other are not looked for after the first segment",
        "            if not tolerance.explains(_disagreement(through, coefficients, tolerance)):",
        "            if False:",
        ("tests/learners/test_carry_edges.py::test_rows_that_influence_each_other_later_are_refused",),
    ),
    Fault(
        "missed_weak_coupling",
        "the states of streams without a cotangent may get a gradient",
        "if back is not None and bool(back[silent].any()):",
        "if False:",
        ("tests/learners/test_carry_edges.py::test_weak_coupling_in_float32_is_refused",),
    ),
    Fault(
        "probe_removed",
        "the probe of a segment is zero, and so agrees with everything",
        "kept = self._coefficients = PROBE_SCALE * drawn.to(like)",
        "kept = self._coefficients = 0.0 * drawn.to(like)",
        (
            "tests/learners/test_carry_edges.py::test_rows_that_influence_each_other_later_are_refused",
            "tests/learners/test_carry_edges.py::test_hooks_that_are_not_linear_are_refused",
        ),
    ),
    Fault(
        "rows_stay_reordered",
        "rows of a map that belong to other streams are taken as they are",
        "            orders = self._placed(rows_of, verified, coefficients, tolerance)\n",
        "",
        ("tests/learners/test_carry_edges.py::test_rows_sorted_and_put_back_are_exact",),
    ),
    Fault(
        "swapped_product",
        "a query of the tree multiplies from the wrong side",
        "product = tree_merge(r[one], c[one], b[one], u[one], *product, num_slots, slot_size)",
        "product = tree_merge(*product, r[one], c[one], b[one], u[one], num_slots, slot_size)",
        ("tests/influence/test_tree.py::test_every_suffix_over_three_wraps",),
    ),
    Fault(
        "swapped_at_the_wrap",
        "where the ring wraps around, older and newer node change places",
        "for i in (2 * index + 1, 2 * index))",
        "for i in sorted((2 * index, 2 * index + 1), key=lambda i: -(i % len(rows[level - 1]))))",
        ("tests/influence/test_tree.py::test_every_suffix_over_three_wraps",),
    ),
    Fault(
        "unpaid_gradient",
        "a flush pays sleeping experts nothing",
        "deferred = total - self.handed_out[streams, experts]",
        "deferred = torch.zeros_like(total)",
        ("tests/learners/test_gradient.py::test_several_optimizer_steps_during_a_sleep",),
    ),
    Fault(
        "handed_out_not_remembered",
        "a flush forgets what it has paid",
        "            self.handed_out[streams, experts] = total\n",
        "",
        ("tests/learners/test_learner.py::test_flush_is_idempotent_and_discard_drops_what_is_deferred",),
    ),
    Fault(
        "paid_again_at_waking",
        "the deferred gradient of an expert that wakes counts what was handed out in its sleep with the wrong sign",
        "self._ops.loss_row_(self.experts, -handed_out, rows)",
        "self._ops.loss_row_(self.experts, handed_out, rows)",
        ("tests/learners/test_gradient.py::test_several_optimizer_steps_during_a_sleep",),
    ),
    Fault(
        "forgotten_loss_row",
        "segments enter the tree without their loss",
        "tree.append_segment(Jh, write, support, self.window_loss_row)",
        "tree.append_segment(Jh, write, support, None)",
        ("tests/learners/test_gradient.py::test_patterns_segments_and_windows",),
    ),
    Fault(
        "loss_outside_the_support",
        "the loss on slots that a segment does not touch is not in the tree",
        "        if bool(outside.any()):  # a loss on copied slots",
        "        if False:  # a loss on copied slots",
        ("tests/learners/test_block_rtrl.py::test_a_loss_on_the_whole_new_state",),
    ),
    Fault(
        "window_committed_twice",
        "a committed window is not emptied",
        "        self.commits += 1\n        self._new_window()\n",
        "        self.commits += 1\n",
        ("tests/learners/test_gradient.py::test_patterns_segments_and_windows",),
    ),
    Fault(
        "reset_forgets_the_payment",
        "streams that start anew lose the deferred gradients of their sleepers",
        "        self._form_deferred(self.influenced & ~self.awake & streams.unsqueeze(1))\n",
        "",
        ("tests/learners/test_gradient.py::test_resets_of_single_streams",),
    ),
    Fault(
        "reset_keeps_the_core",
        "streams that start anew keep the influence of the core",
        "        self.core[streams, :-1] = 0\n",
        "",
        ("tests/learners/test_gradient.py::test_resets_of_single_streams[1-1-eager]",),
    ),
    Fault(
        "no_catch_up_before_the_loss",
        "an expert that wakes keeps the influence of its last update",
        "                self._catch_up(pairs)\n",
        "                pass\n",
        ("tests/learners/test_gradient.py::test_patterns_segments_and_windows",),
    ),
    Fault(
        "no_catch_up_before_a_plan",
        "sleeping experts are forgotten when the plan changes",
        "self._catch_up((self.influenced & ~self.awake).nonzero())\n                self._begin(chosen)",
        "self._begin(chosen)",
        ("tests/ops/test_compiled.py::test_changing_the_plan_keeps_the_gradient",),
    ),
    Fault(
        "idle_experts_stay",
        "without a tree, experts that a window does not use are not moved",
        "            self._apply(moved.Jh, moved.write, moved.support, None, idle)\n",
        "            pass\n",
        ("tests/learners/test_gradient.py::test_patterns_segments_and_windows",),
    ),
    Fault(
        "columns_without_write",
        "the state Jacobian leaves out what the written slots keep of their old content",
        "support = _slots(written.scatter(1, write, True).scatter_(1, support.flatten(1), True))",
        "support = _slots(written.scatter(1, support[..., :read].flatten(1), True))",
        ("tests/capture/test_slot_moe_pass.py::test_gradient_is_that_of_bptt",),
    ),
    Fault(
        "written_rows_stay_the_identity",
        "in a window of several steps the old content of written slots is not cleared",
        "phi = phi.scatter(2, at_write, 0.0).scatter_add_(",
        "phi = phi.scatter_add(",
        ("tests/learners/test_gradient.py::test_patterns_segments_and_windows",),
    ),
    Fault(
        "factors_of_the_wrong_step",
        "in a window of several steps every step has the factors of another one",
        "        core.reverse()\n",
        "",
        ("tests/learners/test_gradient.py::test_patterns_segments_and_windows",),
    ),
    Fault(
        "commit_before_the_step",
        "a commit of the tape takes the inputs of the immediate Jacobians in the wrong order of steps",
        "parts[tap] = deltas[start : start + shape.numel()].view(shape)",
        "parts[tap] = deltas[start : start + shape.numel()].view(shape).flip(0)",
        ("tests/capture/test_row_tape.py",),
    ),
    Fault(
        "a_tap_is_forgotten",
        "of several uses of a parameter on the tape only the first one counts",
        "                uses += self._uses(number, self.row_or_zero(node, node), shape, zs)",
        "                uses += self._uses(number, self.row_or_zero(node, node), shape, zs)[:1]",
        ("tests/capture/test_row_tape.py",),
    ),
    Fault(
        "a_state_that_was_written_to",
        "a state that was changed in place between two calls still makes a chain",
        "            if [noted_versions.get(id(t)) for t in state] != versions:",
        "            if any(id(t) not in noted_versions for t in state):",
        ("tests/learners/test_carry_edges.py::test_the_carried_state_may_be_written_in_place",),
    ),
    Fault(
        "a_trace_is_not_compared_with_what_ran",
        "the state that a trace computes is not compared with the one that the module returned",
        "                self._check_forward(computed, ran)",
        "                pass",
        ("tests/capture/test_row_tape.py::test_what_ran_is_compared_with_what_the_trace_computes",),
    ),
    Fault(
        "decisions_that_hang_on_rounding",
        "steps whose decisions hang on rounding are evaluated again as if they could not fall differently",
        "            if self._shaken is not None:",
        "            if False:",
        (
            "tests/capture/test_row_tape.py"
            "::test_steps_in_which_a_decision_hangs_on_rounding_are_captured_from_the_graph",
        ),
    ),
    Fault(
        "attributes_are_not_looked_at",
        "plain attributes of a module do not belong to the kind of its steps",
        '            if name not in _MODULE_FIELDS or name == "training":',
        '            if name == "training":',
        ("tests/capture/test_row_tape.py::test_attributes_belong_to_the_kind_of_a_step",),
    ),
    Fault(
        "first_state_dropped",
        "the graph of a trained first state is cut off",
        "if self._entry is not None or (end.requires_grad and not self._resumed):",
        "if self._entry is not None:",
        ("tests/learners/test_carry_edges.py::test_first_states_with_a_graph",),
    ),
    Fault(
        "trained_initial_state_dropped",
        "a learner starts its streams without the influence of their initial state",
        "self.influence.begin(streams, *self._initial_influence(initial, tensors))",
        "self._initial_influence(initial, tensors)",
        ("tests/learners/test_initial_state.py::test_it_trains_through_resets",),
    ),
    Fault(
        "joining_drops_the_others",
        "when parameters join, the influence of those that were carried is lost",
        "target[..., mine[name].columns] = source[..., p.columns]",
        "target[..., mine[name].columns] = 0 * source[..., p.columns]",
        (
            "tests/learners/test_learner.py::test_unfreezing_keeps_the_influence_of_the_others",
            "tests/learners/test_carry.py::test_only_parameters_that_reach_the_state_are_carried_and_later_ones_join",
        ),
    ),
    Fault(
        "imaginary_part_dropped",
        "a complex parameter gets the real part of its gradient alone",
        "torch.complex(gradient[..., 0], gradient[..., 1]) if tensor.is_complex()",
        "torch.complex(gradient[..., 0], 0 * gradient[..., 1]) if tensor.is_complex()",
        ("tests/learners/test_carry_edges.py::test_complex_parameters_and_states",),
    ),
    Fault(
        "inputs_of_slot_steps_aliased",
        "the inputs of a captured slot step are the caller's memory",
        "inputs = xs.to(saved.dtype, memory_format=torch.contiguous_format, copy=True)",
        "inputs = xs.to(saved.dtype, memory_format=torch.contiguous_format)",
        ("tests/learners/test_slot_edges.py::test_the_caller_may_reuse_its_input",),
    ),
    Fault(
        "routing_aliased",
        "the routing of a step is the caller's memory",
        "return Routing(routing.read.clone(), routing.write.clone(), routing.experts.clone())",
        "return routing",
        ("tests/learners/test_slot_edges.py::test_the_caller_may_reuse_its_input",),
    ),
    Fault(
        "carried_state_aliased",
        "what carry returns shares memory with what it keeps",
        ".movedim(0, self.batch_dim).to(like.dtype).clone()",
        ".movedim(0, self.batch_dim).to(like.dtype)",
        ("tests/learners/test_carry_edges.py::test_the_carried_state_may_be_written_in_place",),
    ),
    Fault(
        "loading_keeps_the_influence",
        "loading a state from before the first segment keeps the influence there is",
        "        self.like = None\n        self._forget()\n",
        "        self.like = None\n",
        ("tests/learners/test_carry_edges.py::test_a_state_from_before_the_first_segment_forgets_everything",),
    ),
    Fault(
        "verify_never_draws",
        "no segment is ever compared with an ordinary backward pass",
        "return drawn or hooked",
        "return False",
        (
            "tests/learners/test_carry_edges.py::test_verify_notices_a_captured_fault_and_leaves_grad",
            "tests/capture/test_verify_slots.py::test_a_fault_that_begins_later_is_found_and_nothing_is_changed",
        ),
    ),
    Fault(
        "verify_never_compares",
        "segments are compared, and whatever comes out is right",
        "bad = (error > limit) & torch.isfinite(size.sum())",
        "bad = (error < 0) & torch.isfinite(size.sum())",
        (
            "tests/learners/test_carry_edges.py::test_verify_notices_a_captured_fault_and_leaves_grad",
            "tests/capture/test_verify_slots.py::test_a_fault_that_begins_later_is_found_and_nothing_is_changed",
        ),
    ),
    Fault(
        "verify_skips_the_fused_pass",
        "calls of the fused pass are never compared",
        "fused.compare(steps, slots, state, new_state, tensors, self.verifier, self.steps)",
        "pass",
        ("tests/capture/test_verify_slots.py::test_a_fault_of_the_fused_pass_is_found",),
    ),
    Fault(
        "hooks_not_noticed",
        "a hook that is registered in the middle of a stream changes nothing",
        "if hooked or not kind.certain:",
        "if not kind.certain:",
        ("tests/learners/test_carry_edges.py::test_hooks_that_are_not_linear_are_refused",),
    ),
    Fault(
        "second_state_not_noticed",
        "a state that a module keeps inside and detaches is let pass",
        "            if torch.equal(tensor, before):",
        "            if False:",
        ("tests/learners/test_carry_edges.py::test_a_second_state_that_the_loop_detaches_is_refused",),
    ),
    Fault(
        "reducers_run",
        "a capture queues the reduction of distributed gradients",
        "waiting = [w for w in wrappers if w is not None and w.static_graph and",
        "waiting = [w for w in wrappers if False and",
        ("tests/learners/test_carry_edges.py::test_static_graphs_reduce_the_gradients_of_the_loss",),
    ),
    Fault(
        "autocast_not_left",
        "influence is moved in the precision of autocast",
        "with torch.autocast(devices[0], enabled=False), torch.autocast(devices[-1], enabled=False):",
        "with torch.autocast(devices[0]):",
        (
            "tests/learners/test_learner.py::test_under_autocast_the_influence_stays_in_full_precision",
            "tests/capture/test_carry_capture.py::test_autocast_keeps_the_influence_in_float32_and_the_factors",
        ),
    ),
    Fault(
        "reached_unseen",
        "a parameter that is used out of the capture's sight gets no dense Jacobian",
        "        self._note_dense(reached | self.dense)\n",
        "",
        ("tests/learners/test_slot_edges.py::test_a_parameter_used_out_of_sight_is_carried",),
    ),
    Fault(
        "silent_copy_not_checked",
        "the gradients of rows without a cotangent are not looked at",
        "    return idle.any(), (error > tolerance",
        "    return torch.zeros_like(idle.any()), (error > tolerance",
        ("tests/learners/test_slot_edges.py::test_a_weak_influence_of_rows_shows_in_coarse_arithmetic",),
    ),
    Fault(
        "combined_rows_not_checked",
        "the Jacobian of a combination of rows may be anything",
        "return idle.any(), (error > tolerance * torch.maximum(size, 1e-2 * size.amax())).any()",
        "return idle.any(), (error < 0).any()",
        (
            "tests/learners/test_slot_edges.py::test_rows_in_another_order_are_exact",
            "tests/capture/test_verify_slots.py::test_backward_passes_that_are_no_derivative_of_their_rows",
        ),
    ),
    Fault(
        "recomputed_content_not_compared",
        "what a capture recomputes need not be what ran",
        "    return (error > tolerance * torch.maximum(size, 1e-2 * size.amax())).any()\n",
        "    return (error < 0).any()\n",
        (
            "tests/learners/test_slot_edges.py::test_random_numbers_are_refused_with_the_reason",
            "tests/learners/test_block_rtrl.py::test_a_step_with_other_inputs_is_refused",
        ),
    ),
    Fault(
        "not_carried_not_refused",
        "the new state may depend on trainable tensors that nobody carries",
        "        if outside := [name for name, _ in others if name in reached]:",
        "        if outside := []:",
        ("tests/learners/test_slot_edges.py::test_trainable_tensors_that_are_not_carried_are_refused_by_name",),
    ),
    Fault(
        "clipping_before_flush_not_noticed",
        "deferred gradients are added to gradients that were clipped",
        "if any(map(self._changed, self._parameters)) and self._defers():",
        "if False:",
        ("tests/learners/test_deferred.py::test_a_changed_gradient_is_not_added_to",),
    ),
    Fault(
        "unattached_optimizer_not_noticed",
        "an optimizer may step without the deferred gradients of sleeping experts",
        "if not first and not flushed and engine.influence.defers():",
        "if False:",
        ("tests/learners/test_deferred.py::test_an_optimizer_that_is_not_attached_is_noticed_once",),
    ),
    Fault(
        "block_rtrl_routes_again",
        "BlockRTRL asks the router a second time",
        "routing = engine.checked_routing(Routing(*(info[key] for key in _INFO[:3])))",
        "routing = engine.checked_routing(model.route(x_t, entered))",
        ("tests/learners/test_block_rtrl.py::test_a_router_that_draws_is_not_asked_again",),
    ),
    Fault(
        "block_rtrl_other_state",
        "BlockRTRL takes a state that is not the one the step ran with",
        "if not torch.equal(scatter_slots(entered, routing.write, ran), after):",
        "if False:",
        ("tests/learners/test_block_rtrl.py::test_a_first_step_with_another_state_is_refused",),
    ),
    Fault(
        "block_rtrl_forgotten_reset",
        "BlockRTRL carries the influence of another state into a stream that starts anew",
        "        self._check_entered(entered)\n",
        "",
        ("tests/learners/test_block_rtrl.py::test_a_stream_that_starts_anew_needs_a_reset",),
    ),
]

DIAGONAL = [
    Fault(
        "products_of_decays_reversed",
        "a window of steps is multiplied up from the wrong end",
        "products = decays.flip(0).cumprod(0).flip(0)",
        "products = decays.cumprod(0)",
        ("tests/learners/test_diagonal.py::test_losses_in_any_order_within_a_window",),
    ),
    Fault(
        "conjugate_forgotten",
        "a gradient goes back through complex decays without their conjugate",
        "return out, u * decay.conj()",
        "return out, u * decay",
        ("tests/learners/test_diagonal.py::test_losses_in_any_order_within_a_window",),
    ),
    Fault(
        "values_aliased",
        "the values of recorded steps are the memory of parameters",
        "[value.detach().clone() for value in values],",
        "[value.detach() for value in values],",
        ("tests/learners/test_diagonal.py::test_every_step_counts_with_the_parameters_it_was_run_with",),
    ),
    Fault(
        "frozen_steps_count",
        "steps that ran while a parameter was frozen count for it",
        "x = x if trained[0] else torch.zeros_like(x)",
        "x = x",
        ("tests/learners/test_diagonal_edges.py::test_steps_while_a_parameter_was_frozen_do_not_count",),
    ),
    Fault(
        "diagonal_start_forgotten",
        "streams of a diagonal cell start without the influence of their initial entries",
        "            self.influence.begin(fresh)\n",
        "            pass\n",
        ("tests/learners/test_diagonal_edges.py::test_a_trained_initial_state_is_exact",),
    ),
    Fault(
        "reset_drops_the_window_of_others",
        "when some streams start anew, the steps of the others that are not committed yet are lost",
        "            self._commit(None, streams)\n",
        "            self._empty_window()\n",
        ("tests/learners/test_diagonal.py::test_gradient_is_that_of_bptt",),
    ),
    Fault(
        "structure_not_checked",
        "a step may branch on its state and couple entries that it did not",
        "        if errors and float(torch.stack(errors).max()) > limit:",
        "        if False:",
        (
            "tests/learners/test_diagonal.py::test_a_step_that_branches_on_its_state_is_refused_where_the_structure_changes",
        ),
    ),
    Fault(
        "changed_runs_not_noticed",
        "a segment whose tensors were written to since they ran is recorded",
        "return all(torch.equal(now.detach(), then) for now, then in zip(live, copies, strict=True))",
        "return True",
        (
            "tests/learners/test_diagonal_edges.py::test_states_written_to_are_named_or_start_anew",
            "tests/learners/test_diagonal_edges.py::test_a_weight_that_changes_before_carry_is_refused_or_does_not_matter",
        ),
    ),
]

KERNELS = [
    Fault(
        "loss_row_sign",
        "the reference adds the loss row with the wrong sign",
        "flat.index_add_(0, base.flatten() + rows_per_matrix - 1, gain)",
        "flat.index_add_(0, base.flatten() + rows_per_matrix - 1, -gain)",
        ("tests/ops/test_ops.py::test_influence_update",),
    ),
    Fault(
        "new_rows_read",
        "the reference takes the loss row from rows that were already written",
        "    if loss_row is not None:\n        gain = torch.bmm(loss_row.index_select(0, streams).unsqueeze(1), old)",
        "    flat.index_copy_(\n"
        "        0, (base + slot_entries(write, slot_size).index_select(0, streams)).flatten(), new.flatten(0, 1)\n"
        "    )\n"
        "    old = flat.index_select(0, read_rows).view(len(groups), -1, columns)\n"
        "    if loss_row is not None:\n        gain = torch.bmm(loss_row.index_select(0, streams).unsqueeze(1), old)",
        ("tests/ops/test_ops.py::test_influence_update",),
    ),
    Fault(
        "duplicated_columns_overwrite",
        "in a leaf, columns of a slot that is read and written replace each other",
        "summed.scatter_add_(3, column.view(batch, 1, 1, -1, 1).expand_as(blocks), blocks)",
        "summed.scatter_(3, column.view(batch, 1, 1, -1, 1).expand_as(blocks), blocks)",
        ("tests/influence/test_tree.py::test_every_suffix_over_three_wraps",),
    ),
    Fault(
        "copied_rows_are_zero",
        "in a product of nodes, rows that one of them does not write are zero",
        "out = torch.where(row_found.view(batch, num_rows, 1, 1, 1), old, identity)",
        "out = torch.where(row_found.view(batch, num_rows, 1, 1, 1), old, 0 * identity)",
        ("tests/influence/test_tree.py::test_every_suffix_over_three_wraps",),
    ),
    Fault(
        "repeated_rows_count_twice",
        "a row vector goes through the repeated rows of a node more than once",
        "written = v.gather(1, entries) * first_occurrence(rows).repeat_interleave(slot_size, 1)",
        "written = v.gather(1, entries)",
        ("tests/ops/test_compiled.py::test_operations_on_rings",),
    ),
    Fault(
        "one_segment_too_few",
        "the reference's catch-up leaves out the newest segment",
        "for t in range(min(starts.tolist(), default=now), now):",
        "for t in range(min(starts.tolist(), default=now), now - 1):",
        ("tests/ops/test_compiled.py::test_operations_on_rings",),
    ),
    Fault(
        "conjugate_of_the_influence_forgotten",
        "the reference's gradient of a complex diagonal recurrence takes P itself",
        'g.add_(torch.einsum("br,brj->rj", u, P.conj()))',
        'g.add_(torch.einsum("br,brj->rj", u, P))',
        (
            "tests/ops/test_diagonal_ops.py::test_reference",
            "tests/ops/test_diagonal_ops.py::test_gradient_of_a_recurrence",
        ),
    ),
    Fault(
        "triton_loss_row_of_the_last_block",
        "the Triton kernels forget all but the last block of the loss row",
        "            partial += u[:, None] * p\n    return acc",
        "            partial = u[:, None] * p\n    return acc",
        ("tests/ops/test_triton.py::test_influence_update",),
    ),
    Fault(
        "triton_columns_beyond_the_edge",
        "a Triton kernel adds inputs of other outputs of a map to a column",
        "& inside[None, :] & ((local // width)[None, :] == at_m[:, None])",
        "& inside[None, :]",
        ("tests/ops/test_triton.py::test_influence_update",),
    ),
    Fault(
        "triton_conjugate",
        "the Triton kernel of diagonal recurrences takes P itself for its conjugate",
        "gain_im += u_im * re - u * im",
        "gain_im += u_im * re + u * im",
        ("tests/ops/test_triton.py::test_diagonal_update",),
    ),
]

CELLS = [
    Fault(
        "gate_swapped",
        "the gate keeps what it should replace",
        "return torch.lerp(h_write, candidate.to(h_write.dtype), gate.to(h_write.dtype))",
        "return torch.lerp(candidate.to(h_write.dtype), h_write, gate.to(h_write.dtype))",
        ("tests/capture/test_slot_moe_pass.py::test_evaluation_gives_the_outputs_of_the_cell",),
    ),
    Fault(
        "least_important_slots",
        "the slots with the smallest importance are written",
        "write = importance.topk(self.write_slots, dim=1).indices",
        "write = importance.topk(self.write_slots, dim=1, largest=False).indices",
        ("tests/capture/test_slot_moe_pass.py::test_evaluation_gives_the_outputs_of_the_cell",),
    ),
    Fault(
        "most_used_slots",
        "with write_to='least_used' the slots with the largest content are written",
        "write = state.square().sum(-1).argsort(dim=1, stable=True)[:, : self.write_slots]",
        "write = state.square().sum(-1).argsort(dim=1, stable=True, descending=True)[:, : self.write_slots]",
        ("tests/capture/test_slot_moe_pass.py::test_evaluation_gives_the_outputs_of_the_cell",),
    ),
    Fault(
        "expert_of_another_stream",
        "active experts get the inputs of the next stream",
        "active = weight.index_select(0, experts.reshape(-1)).unflatten(0, (batch, k))",
        "active = weight.index_select(0, experts.roll(1, 0).reshape(-1)).unflatten(0, (batch, k))",
        (
            "tests/cells/test_cells.py::test_rows_are_independent",
            "tests/learners/test_gradient.py::test_gradient_at_every_token[1-SlotMoECell]",
            "tests/learners/test_gradient.py::test_gradient_at_every_token[1-SparseLatentMoECell]",
        ),
    ),
    Fault(
        "slots_of_another_stream",
        "the slots of the next stream are read",
        "return state.gather(1, slots.unsqueeze(-1).expand(-1, -1, state.shape[-1]))",
        "return state.roll(1, 0).gather(1, slots.unsqueeze(-1).expand(-1, -1, state.shape[-1]))",
        ("tests/cells/test_cells.py::test_rows_are_independent",),
    ),
    Fault(
        "lru_without_gamma",
        "the LRU does not scale its input",
        "return torch.addcmul(gamma * Bx, eigenvalues, h)",
        "return torch.addcmul(Bx, eigenvalues, h)",
        ("tests/cells/test_diagonal_cells.py::test_lru_is_the_power_sum_of_its_paper",),
    ),
    Fault(
        "mamba_without_step",
        "S6 does not discretise its input",
        "return torch.exp(delta * A) * h + delta * B * u",
        "return torch.exp(delta * A) * h + B * u",
        ("tests/cells/test_diagonal_cells.py::test_mamba_is_the_recurrence_of_its_paper",),
    ),
    Fault(
        "rwkv_starts_too_high",
        "the sums of RWKV start with an exponent above its keys",
        "entries[:, 2] = -1e30",
        "entries[:, 2] = 1.0",
        ("tests/cells/test_diagonal_cells.py::test_rwkv_does_not_overflow",),
    ),
    Fault(
        "check_misses_columns",
        "check_cell does not look at undeclared columns",
        "own = own.abs().sum(0).index_fill(0, support_entries[stream], 0.0)\n            if bool(own.any()):",
        "own = own.abs().sum(0).index_fill(0, support_entries[stream], 0.0)\n            if False:",
        ("tests/learners/test_check.py::test_violations_are_named",),
    ),
    Fault(
        "readout_is_carried",
        "parameters under readout are carried",
        'if name == "readout" or name.startswith("readout.") or not any(',
        'if name == "readout" or not any(',
        ("tests/learners/test_learner.py::test_estimate_counts_what_is_allocated",),
    ),
]

METHODS = [
    Fault(
        "uoro_scales_swapped",
        "UORO multiplies where it should divide",
        "self._weights = self._weights / rho0 + immediate / rho1",
        "self._weights = self._weights * rho0 + immediate / rho1",
        ("tests/learners/test_methods.py::test_uoro_is_unbiased",),
    ),
    Fault(
        "pattern_forgets_when_it_grows",
        "SnAp-1 forgets its influence when the pattern grows",
        "values[:, group, place[group, old_place]] = self.values[:, group, old_place]",
        "values[:, group, place[group, old_place]] = 0 * self.values[:, group, old_place]",
        ("tests/learners/test_methods.py::test_equals_the_textbook[snap1-lstm]",),
    ),
    Fault(
        "rflo_keeps_products",
        "RFLO takes the whole state Jacobian",
        "return elementwise_jacobian(end, entry, graph)",
        "return J",
        ("tests/learners/test_methods.py::test_equals_the_textbook[rflo-gru]",),
    ),
    Fault(
        "check_of_carry_passes_all",
        "Carry.check accepts any error",
        "if not error <= max(map(tolerance_of, dtypes))}",
        "if False}",
        ("tests/learners/test_carry_edges.py::test_check_compares_with_bptt",),
    ),
    Fault(
        "dense_baseline_without_write",
        "the dense baseline forgets what the written slots keep",
        "torch.cat((by_read.flatten(2), by_write.flatten(2)), dim=2)",
        "torch.cat((by_read.flatten(2), 0 * by_write.flatten(2)), dim=2)",
        ("tests/training/test_baselines.py::test_dense_jacobian_rtrl_is_bptt",),
    ),
]

TRAINING = [
    Fault(
        "gradients_never_cleared",
        "the trainer adds up gradients over all steps",
        "        self.optimizer.step()\n        self.optimizer.zero_grad()\n",
        "        self.optimizer.step()\n",
        ("tests/training/test_training.py::test_trainer_steps_once_per_batch_or_per_asking_segment",),
    ),
    Fault(
        "deferred_gradients_not_completed",
        "the trainer clips before deferred gradients are paid",
        "        self.method.complete_gradient()\n",
        "",
        ("tests/training/test_training.py::test_trainer_steps_once_per_batch_or_per_asking_segment",),
    ),
    Fault(
        "clipping_to_nothing",
        "the trainer does not clip",
        "        if self.clip_norm is not None:\n",
        "        if False:\n",
        ("tests/training/test_training.py::test_trainer_steps_once_per_batch_or_per_asking_segment",),
    ),
    Fault(
        "unasked_answers_count",
        "targets that are not asked for count as hits",
        "Tally(float(loss.detach()), correct, classes.numel())",
        "Tally(float(loss.detach()), correct, target.numel())",
        ("tests/training/test_training.py::test_answer_loss_counts_only_what_is_asked",),
    ),
    Fault(
        "stream_resumes_too_late",
        "a training that is saved inside a batch goes on with the next one",
        '"stream": self._before_batch if self._done else self.stream.state_dict(),',
        '"stream": self.stream.state_dict(),',
        (
            "tests/training/test_run.py::test_gradients_of_a_batch_in_progress_are_saved",
            "tests/training/test_run.py::test_resuming_from_anywhere_is_bit_for_bit",
        ),
    ),
    Fault(
        "gradients_not_resumed",
        "gradients of a batch in progress are lost with a checkpoint",
        "parameter.grad = None if gradient is None else gradient.to(parameter.device, copy=True)",
        "parameter.grad = None",
        ("tests/training/test_run.py::test_gradients_of_a_batch_in_progress_are_saved",),
    ),
    Fault(
        "checksum_not_compared",
        "a damaged checkpoint is read",
        "if _checksum(version, length, digest.digest()) != checksum:",
        "if False:",
        ("tests/training/test_checkpoint.py::test_any_flipped_bit_is_noticed",),
    ),
    Fault(
        "renamed_before_written",
        "a checkpoint takes its name before its content is on the disk",
        "            os.fsync(file.fileno())\n        os.replace(new, path)\n",
        "        os.replace(new, path)\n",
        ("tests/training/test_checkpoint.py::test_the_rename_comes_after_the_content_is_on_the_disk",),
    ),
    Fault(
        "predicts_itself",
        "a corpus asks for the symbol that it shows",
        "target[stream, :count] = symbols[1:].masked_fill(symbols[1:] >= self.output_size, IGNORE)",
        "target[stream, :count] = symbols[:-1].masked_fill(symbols[1:] >= self.output_size, IGNORE)",
        ("tests/training/test_streams.py::test_streams_predict_the_next_byte_and_go_round",),
    ),
    Fault(
        "reset_forgotten_at_a_record",
        "a new record goes on with the state of the last one",
        "                ended[stream] = True\n",
        "                ended[stream] = False\n",
        ("tests/training/test_streams.py::test_records_are_sequences_of_their_own_where_asked",),
    ),
    Fault(
        "interval_too_narrow",
        "the interval of an accuracy leaves out a term",
        "math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))",
        "math.sqrt(share * (1 - share) / trials)",
        ("tests/training/test_training.py::test_wilson_interval_matches_published_values",),
    ),
    Fault(
        "lyapunov_scale",
        "the gradient of the Lyapunov exponent is not divided by the length of the vector",
        "scale = torch.where(alive, torch.exp(-growth), 0.0)",
        "scale = torch.where(alive, torch.ones_like(growth), 0.0)",
        ("tests/training/test_lyapunov.py::test_gradient_of_a_scalar_map_is_analytic",),
    ),
]

PLANNER = [
    Fault(
        "replay_merges",
        "the path of replay is that of products",
        "return Plan(eager=False, buffer=buffer, levels=0, product_from=0)",
        "return Plan(eager=False, buffer=buffer, product_from=1)",
        (
            "tests/learners/test_gradient.py::test_products_of_the_tree_were_used",
            "tests/ops/test_compiled.py::test_plans",
        ),
    ),
    Fault(
        "commits_cost_nothing",
        "the cost model of a window forgets the product of the state Jacobian",
        "return (groups.core_columns + awake) * (rows * cols / n + rows)",
        "return (groups.core_columns + awake) * rows",
        ("tests/influence/test_estimate.py::test_a_small_state_asks_for_longer_windows_than_many_sleeping_experts",),
    ),
    Fault(
        "loss_row_not_counted",
        "the estimate of the influence leaves out the loss row",
        "influence_bytes = item * batch_size * (hidden + 1) * groups.count",
        "influence_bytes = item * batch_size * hidden * groups.count",
        ("tests/learners/test_learner.py::test_estimate_counts_what_is_allocated",),
    ),
    Fault(
        "memory_not_refused",
        "influence that cannot fit is allocated",
        "needed = like.element_size() * batch_size * (hidden_size + 1) * groups.count",
        "needed = like.element_size()",
        ("tests/learners/test_learner.py::test_influence_that_cannot_fit_is_refused_with_the_numbers",),
    ),
]

FAULTS = [*ENGINE, *DIAGONAL, *KERNELS, *CELLS, *METHODS, *TRAINING, *PLANNER]


@dataclass(frozen=True)
class Outcome:
    """What came of a planted fault.

    Attributes:
        name: of the fault.
        what: the fault in words.
        verdict: ``"caught"``, ``"survived"`` or ``"invalid"``.
        detail: the test that failed, or why the fault is invalid.
        seconds: wall-clock time of its tests.
    """

    name: str
    what: str
    verdict: str
    detail: str
    seconds: float


def places(fault: Fault, root: Path) -> list[Path]:
    """The files that a fault's text is in, one entry for each time it occurs."""
    files = [file for folder in SOURCES for file in sorted((root / folder).rglob("*.py"))]
    return [file for file in files for _ in range(file.read_text().count(fault.old)) if _is_own(file, root)]


def _is_own(file: Path, root: Path) -> bool:
    """Whether a file is reached by its own path and not through a link."""
    return file.resolve() == root.resolve() / file.relative_to(root)


def copy_of(tree: Path, target: Path) -> Path:
    """A copy of a tree, compiled parts included."""
    shutil.copytree(tree, target, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return target


def run_pytest(tree: Path, *arguments: str, limit: float | None = None) -> tuple[int, str]:
    """Exit status and output of pytest in a tree; its own package is the one that the tests import."""
    environment = {**os.environ, **SETTINGS, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit
    )
    return done.returncode, done.stdout


def failures(output: str) -> list[tuple[str, str]]:
    """The tests that failed by the summary of pytest, each with its error."""
    lines = re.findall(r"^FAILED (.*)$", output, re.MULTILINE)
    return [(test, error) for test, _, error in (line.partition(" - ") for line in lines)]


def _belongs(test: str, chosen: str) -> bool:
    """Whether a test is one of those that an id stands for: a file, a function or a single test."""
    return test == chosen or test.startswith((f"{chosen}[", f"{chosen}::"))


def judged(fault: Fault, tree: Path) -> tuple[str, str]:
    """Plant a fault in a tree and run its tests: the verdict, and its detail."""
    found = places(fault, tree)
    if len(found) != 1:
        where = ", ".join(str(file.relative_to(tree)) for file in found) or "nowhere"
        return "invalid", f"its text must occur once, but it is {where}"
    found[0].write_text(found[0].read_text().replace(fault.old, fault.new))
    try:
        status, output = run_pytest(tree, "-x", "-rf", "--tb=short", *fault.tests, limit=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        return "invalid", f"its tests took more than {TIME_LIMIT:.0f} s"
    if status == 0 and not re.search(r"\d+ passed", output):
        return "invalid", f"none of {', '.join(fault.tests)} ran here: {output.strip().splitlines()[-1]}"
    if status == 0:
        return "survived", f"in {found[0].relative_to(tree)}; all of {', '.join(fault.tests)} passed"
    failed = failures(output)
    if status != 1 or not failed:
        return "invalid", f"pytest ended with status {status}: {output.strip().splitlines()[-1]}"
    test, error = failed[0]
    if error.startswith(NO_FAULTS):
        return "invalid", f"the planted code does not run: {error}"
    return "caught", f"{test}: {error[:200]}"


def outcomes_of(faults: list[Fault], processes: int) -> list[Outcome]:
    """Plant faults one at a time, each in a copy of its own.

    Raises:
        SystemExit: if the tests cannot be run without a fault.
    """
    with tempfile.TemporaryDirectory(prefix="planted_faults_") as folder, ThreadPoolExecutor(processes) as pool:
        # Its compiled modules serve all copies.
        clean = copy_of(ROOT, Path(folder) / "clean")
        wanted = sorted({test for fault in faults for test in fault.tests})
        parts = [wanted[part::processes] for part in range(processes)]
        red: list[str] = []
        for status, output in pool.map(lambda tests: run_pytest(clean, "-rf", *tests), filter(None, parts)):
            red += [test for test, _ in failures(output)]
            if status not in (0, 1):
                raise SystemExit(f"{output}\nthe tests do not run without a fault")

        def outcome(fault: Fault) -> Outcome:
            tree = copy_of(clean, Path(folder) / fault.name)
            began = time.perf_counter()
            already = [test for test in red if any(_belongs(test, chosen) for chosen in fault.tests)]
            verdict, detail = ("invalid", f"fails without it: {already[0]}") if already else judged(fault, tree)
            shutil.rmtree(tree)
            print(f"{verdict:>8}  {fault.name}  ({detail})", flush=True)
            return Outcome(fault.name, fault.what, verdict, detail, time.perf_counter() - began)

        return list(pool.map(outcome, faults))


def main(arguments: list[str] | None = None) -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="plant these")
    parser.add_argument("--sample", type=int, metavar="N", help="plant N of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--list", action="store_true", help="show the faults and plant none")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write what came of every fault")
    options = parser.parse_args(arguments)
    faults = FAULTS
    if options.only:
        unknown = sorted(set(options.only) - {fault.name for fault in FAULTS})
        if unknown:
            parser.error(f"--only must name faults of --list, got {', '.join(unknown)}")
        faults = [fault for fault in faults if fault.name in options.only]
    if options.sample is not None:
        faults = random.Random(options.seed).sample(faults, min(options.sample, len(faults)))
    if options.list:
        for fault in faults:
            print(f"{fault.name}: {fault.what}")
        return 0
    began = time.perf_counter()
    outcomes = outcomes_of(faults, max(1, options.processes))
    counts = Counter(outcome.verdict for outcome in outcomes)
    missed = [outcome for outcome in outcomes if outcome.verdict != "caught"]
    print(f"\n{counts['caught']} of {len(outcomes)} faults were caught in {time.perf_counter() - began:.0f} s")
    for outcome in missed:
        print(f"{outcome.verdict}: {outcome.name}, {outcome.what}\n    {outcome.detail}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    return len(missed)


if __name__ == "__main__":
    sys.exit(main())
