"""Server: FedAvg of what clients masked."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from secure_fedprompt.flower import SecureGrid
from secure_fedprompt.flower.prompts import evaluator, initial_arrays

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    FedAvg(fraction_evaluate=0.0, min_available_nodes=3).start(
        grid=SecureGrid(
            grid,
            context,
            key=str(config["key"]),
            roster=str(config["roster"]),
            run_dir=str(config["run-dir"]),
        ),
        initial_arrays=initial_arrays(config),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=evaluator(config),
    )
