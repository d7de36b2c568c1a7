"""The routes under /steer, and /v1/models with the arms: the entry point of `vllm.endpoint_plugins`.

There is no `from __future__ import annotations` here, because FastAPI reads the annotations of the routes.
"""

import asyncio
import atexit
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from probes.models.markers import WHAT, Markers
from steer.serving.engine import frontend_hooks, metrics
from steer.serving.engine.admission import Admission, explain
from steer.serving.http import bodies, exposure_metrics, followed, uploads
from steer.serving.http.fields import Serving
from steer.serving.http.middleware import Middleware
from steer.serving.http.routes import FEEDBACK
from steer.serving.settings import NAME, adapter_name
from vectors.errors import SteerError, UsageError
from vectors.probe import Probe

if TYPE_CHECKING:
    from steer.experiments.running.live import Live


class Endpoints:
    """The plugin as vLLM expects it: a name, the tasks it requires, its routes, and the state behind them."""

    name = NAME
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.engine: Any = None
        self.models: Any = None
        self.serving: Serving | None = None  # before the start
        self.servers = 1
        self.limits = bodies.Limits(0, 0)  # of the body of a request to vLLM's routes
        self.experiments: dict[str, Live] = {}  # those that run, by name
        self.followed: dict[str, followed.Followed] = {}  # arms that stand for an alias of a store, by name
        self.following: list[Any] = []  # the tasks that read the aliases, and the states of the logs
        self.adapters: dict[str, dict[str, str]] = {}  # served names of their LoRA arms, by experiment and arm

    def attach_router(self, app: Any) -> None:
        """Add the routes and the middleware. vLLM's own middleware, which checks the API key, runs before ours."""
        authorised = _authorisation(app.state.args)

        async def allowed(request: Request) -> None:
            if not authorised(request.headers):
                raise HTTPException(401, "Unauthorized")

        router, guarded = APIRouter(), APIRouter(prefix="/steer", dependencies=[Depends(allowed)])

        @router.get("/v1/models")
        async def models(request: Request) -> Any:
            listing = (await request.app.state.openai_serving_models.show_available_models()).model_dump()
            for card in list(listing["data"]):
                for arm in list(self.admission.arms):
                    listing["data"].append({**card, "id": f"{card['id']}:{arm}", "parent": card["id"]})
            card = listing["data"][0]
            for name in self.experiments:
                listing["data"].append({**card, "id": name, "parent": card["id"]})
            return JSONResponse(listing)

        @router.post(FEEDBACK)
        async def give_feedback(request: Request) -> Any:
            from steer.serving.http import feedback  # which needs the extra `ab`, as experiments do

            try:
                status, body = await feedback.receive(request.scope, request.receive, self.experiments)
            except bodies.TooLarge as error:
                return _too_large(error)
            return JSONResponse(body, status)

        @guarded.get("/experiments")
        async def running() -> Any:
            return {"experiments": {name: live.summary() for name, live in self.experiments.items()}}

        @guarded.get("")
        async def state() -> Any:
            return await self.state()

        @guarded.get("/vectors")
        async def vectors() -> Any:
            return self.vectors()

        @guarded.post("/vectors")
        async def load(request: Request) -> Any:
            try:
                self._require_one_server()
                name, vector = await uploads.received(self.admission, request)
                digest = await frontend_hooks.bind(self.engine, name, vector)
            except ClientDisconnect:
                return Response(status_code=499)  # the client has disconnected
            except bodies.TooLarge as error:
                return _too_large(error)
            except (SteerError, ValueError) as error:
                return _error(400, explain(error) if isinstance(error, SteerError) else str(error))
            metrics.get().vectors.set(len(self.admission.bound))
            return {"name": name, "digest": digest}

        @guarded.delete("/vectors/{name}")
        async def unload(name: str) -> Any:
            try:
                self._require_one_server()
                self._require_unused(name)
                digest = frontend_hooks.unbind(self.engine, name)
            except SteerError as error:
                return _error(404 if name not in self.admission.bound else 409, explain(error))
            metrics.get().vectors.set(len(self.admission.bound))
            return {"name": name, "digest": digest}

        @guarded.get("/arms")
        async def arms() -> Any:
            return {"arms": self.arms()}

        @guarded.post("/arms")
        async def add_arm(request: Request) -> Any:
            try:
                self._require_one_server()
                name, expression = await uploads.received_arm(request)
                resolved = self.admission.add_arm(name, expression)
            except ClientDisconnect:
                return Response(status_code=499)  # the client has disconnected
            except bodies.TooLarge as error:
                return _too_large(error)
            except SteerError as error:
                return _error(400, explain(error))
            return {"name": name, "expression": resolved.expression, "digest": resolved.key}

        @guarded.delete("/arms/{name}")
        async def remove_arm(name: str) -> Any:
            try:
                self._require_one_server()
                composition = self.admission.remove_arm(name)
            except SteerError as error:
                return _error(404, explain(error))
            return {"name": name, "expression": str(composition)}

        app.include_router(router)
        app.include_router(guarded)
        app.add_middleware(Middleware, find=self._find, routes=lambda: app.router.routes)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Start serving with this engine: its workers get the vectors."""
        self.engine, self.models = engine_client, state.openai_serving_models
        self.servers = getattr(args, "api_server_count", None) or 1
        model = engine_client.model_config
        media = bool(model.is_multimodal_model)
        self.limits = bodies.limits(self.admission.settings.max_body, model.max_model_len, media=media)
        await frontend_hooks.begin_serving(engine_client, shared=self.servers > 1)
        metrics.get().vectors.set(len(self.admission.bound))
        await self._begin_experiments()
        self.followed = followed.begin(self.admission.settings.versions, self.admission)
        if self.followed and self.servers == 1:  # several front ends share no names, so their arms stay what they are
            self.following.append(asyncio.create_task(followed.follow(engine_client, self.followed)))
        self.serving = self._serving()

    @property
    def admission(self) -> Admission:
        """The admission of the engine."""
        return frontend_hooks.admission_of(self.engine.input_processor)

    async def state(self) -> dict[str, Any]:
        """The answer to GET /steer: arms, vectors, slots (`rows`), and the state of the workers."""
        from steer import __version__

        admission = self.admission
        return {
            "version": __version__,
            "arms": self.arms(),
            "versions": {arm: each.value() for arm, each in self.followed.items()},
            **self.vectors(),
            "rows": admission.settings.rows,
            "directions": admission.settings.directions,
            "steps": admission.settings.steps,
            "gates": admission.settings.gates,
            "gate_layers": admission.settings.gate_layers,
            "sections": [name for name in WHAT if (admission.markers or Markers()).of(name)[0]],
            "max_body": self.limits.size,
            "workers": await self.engine.collective_rpc("steer_state"),
            "base": dict(admission.base) if admission.base else None,
        }

    def arms(self) -> dict[str, Any]:
        """The arms: expression and digest of each, by name."""
        resolved = self.admission.resolved_arms()
        return {name: {"expression": arm.expression, "digest": arm.key} for name, arm in resolved.items()}

    def vectors(self) -> dict[str, Any]:
        """The answer to GET /steer/vectors: digest and layers of each vector and probe, by name."""
        vectors, probes = {}, {}
        with self.admission.lock:
            for name, (each, digest) in self.admission.bound.items():
                if isinstance(each, Probe):
                    probes[name] = {"digest": digest, "layers": list(each.layers), "layer": each.layer}
                else:
                    vectors[name] = {"digest": digest, "layers": list(each.layers), "apply": list(each.apply)}
        return {"vectors": vectors, "probes": probes}

    def _require_one_server(self) -> None:
        """Refuse to bind or unbind where several API servers run, since they share no names. Raises UsageError."""
        if self.servers > 1:
            raise UsageError(
                f"this deployment has {self.servers} API servers, which share no names",
                "give the vectors at the start, or serve with --api-server-count 1",
            )

    def _require_unused(self, name: str) -> None:
        """Refuse to unbind a vector or probe that an experiment uses. Raises UsageError."""
        from steer.experiments.running import readouts

        for live in self.experiments.values():
            if name in readouts.sources(live.experiment):
                raise UsageError(f"{name!r} is part of the experiment {live.experiment.name}", "it runs until the end")

    async def _begin_experiments(self) -> None:
        """Open the logs of the experiments. Raises SteerError."""
        experiments = self.admission.settings.experiments
        if not experiments:
            return
        from steer.experiments.running import live
        from steer.serving import reading

        for experiment in experiments:
            name = experiment.name
            if self._is_model(name):
                raise UsageError(f"the experiment {name} is called as a model is", "give it another name")
            self.adapters[name] = {arm.name: adapter_name(name, arm.name) for arm in experiment.arms if arm.lora}
            missing = [adapter for adapter in self.adapters[name].values() if not self._is_model(adapter)]
            if missing:
                raise UsageError(f"no adapter is called {', '.join(missing)}", "start it by steer serve --experiment")
            read = reading.reader(self.engine, self.admission, experiment) if experiment.readouts else None
            self.experiments[name] = begun = live.begin(experiment, read)
            begun.start()
            atexit.register(begun.end)
        self.following.append(asyncio.create_task(exposure_metrics.follow(self.experiments)))
        await self._weights_changed()

    async def _weights_changed(self) -> None:
        version = await self.engine.get_weight_version()
        for live in self.experiments.values():
            live.weight_version = version

    def _is_model(self, name: str) -> bool:
        return bool(self.models.is_base_model(name) or name in self.models.lora_requests)

    def _find(self) -> Serving | None:
        return self.serving

    def _serving(self) -> Serving:
        """What the middleware reads at every request, made once."""
        from vllm import envs

        return Serving(
            self.admission,
            self._is_model,
            self.limits,
            any_model=bool(envs.VLLM_SKIP_MODEL_NAME_VALIDATION),
            base=self.models.base_model_paths[0].name,
            names=[path.name for path in self.models.base_model_paths],
            experiments=self.experiments,
            adapters=self.adapters,
            followed=self.followed,
            weights_changed=self._weights_changed if self.experiments else None,
        )


def _error(status: int, message: str) -> JSONResponse:
    kind = {404: "NotFoundError", 409: "ConflictError"}.get(status, "BadRequestError")
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)


def _too_large(error: bodies.TooLarge) -> JSONResponse:
    return JSONResponse(error.body, 413, {"connection": "close"} if error.close else None)


def _authorisation(args: Any) -> Any:
    """A function that says whether headers carry the server's API key, by vLLM's own check for /v1."""
    from vllm import envs
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    tokens = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    if not tokens:
        return lambda headers: True
    return AuthenticationMiddleware(None, tokens).verify_token
