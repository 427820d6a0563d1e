"""Digests of the seams' sources in sglang 0.5.23."""

# Printed by: python -m sglang_shift.seams
# ruff: noqa: E501
DIGESTS = {
    "sglang.srt.layers.layernorm_sp:runs_sp": "61d271345585cf1a",
    "sglang.srt.layers.layernorm_sp:sp_entry_scatter": "16d9bf08c69ca47e",
    "sglang.srt.layers.layernorm_sp:maybe_exit_gather": "c8537eb9ebac450b",
    "sglang.srt.layers.layernorm_sp:column_parallel_g_matmul": "5312926f2e856bdf",
    "sglang.srt.layers.layernorm_sp:row_parallel_gbar_matmul": "d177c362c456307e",
    "sglang.srt.managers.scheduler:Scheduler.init_tp_model_worker": "0705603e0b266983",
    "sglang.srt.managers.scheduler:Scheduler.run_batch": "4e9bb4d5e649e2f1",
    "sglang.srt.managers.scheduler:Scheduler.init_internal_state": "e456fe7950d61ec2",
    "sglang.srt.managers.scheduler_components.internal_state:SchedulerInternalStateController.get_internal_state": "f01b820545684122",
    "sglang.srt.managers.scheduler_components.internal_state:SchedulerInternalStateController._update_handlers": "4c829223260efeb0",
    "sglang.srt.managers.tp_worker:TpModelWorker._init_model_runner": "f36d22229ba4aec9",
    "sglang.srt.model_executor.model_runner:ModelRunner.load_model": "bf6781e45efd63b5",
    "sglang.srt.model_executor.model_runner:ModelRunner.init_weight_updater": "fe51fa768d092f08",
    "sglang.srt.model_executor.model_runner:ModelRunner._forward_raw": "37e7e9e99731ff1b",
    "sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater.update_weights_from_disk": "2510a4bd6c7ada03",
    "sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater.load_weights_from_distributed": "8093cef1270e8b49",
    "sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater.update_weights_from_tensor": "301123886073eac4",
    "sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater.update_weights_from_ipc": "ce0d0dddabc4922e",
    "sglang.srt.model_executor.model_runner_components.weight_updater:WeightUpdater.end_weight_update": "4c447f34e5bda06c",
    "sglang.srt.layers.linear:ColumnParallelLinear.forward": "566d33e2f987a0a5",
    "sglang.srt.layers.linear:RowParallelLinear.forward": "fdc660bd4e36a7d0",
    "sglang.srt.layers.layer_boundary.stage:StageBoundary._select": "1f646f72b96e8db7",
    "sglang.srt.layers.layer_boundary.factories:_active_variants": "887964bbd645149d",
    "sglang.srt.layers.logits_processor:LogitsProcessor.forward": "cb0c03324bcc376d",
    "sglang.srt.layers.logits_processor:LogitsProcessor._get_pruned_states": "fd309cf7f24f94fe",
    "sglang.srt.managers.scheduler:run_scheduler_process": "f52f0de806e29a75",
    "sglang.srt.configs.update_config:adjust_config_with_unaligned_cpu_tp": "fcbd518636d151c3",
}
