"""OpenAI's agents: a run, a streamed run, structured output and a tool that is called, over both of its models."""

from __future__ import annotations

import asyncio

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from shared import KEY, MODEL, QUESTION, SYSTEM, TOKENS, URL, Day, check_day, check_stream

noted: list[Day] = []


@function_tool(is_enabled=lambda context, agent: not noted)  # a small model would call it for ever
def note(day: Day) -> str:
    """Notes a day."""
    noted.append(day)
    return "noted"


async def use(model: OpenAIChatCompletionsModel | OpenAIResponsesModel) -> None:
    """Everything, with one of the models."""
    settings = ModelSettings(temperature=0, max_tokens=TOKENS)
    agent = Agent(name="gardener", instructions=SYSTEM, model=model, model_settings=settings)
    whole = (await Runner.run(agent, QUESTION)).final_output
    run = Runner.run_streamed(agent, QUESTION)
    pieces = [
        e.data.delta
        async for e in run.stream_events()
        if e.type == "raw_response_event" and e.data.type == "response.output_text.delta"
    ]
    check_stream(pieces, whole)
    agent = Agent(name="gardener", model=model, model_settings=settings, output_type=Day)
    check_day((await Runner.run(agent, QUESTION)).final_output)
    noted.clear()
    called = ModelSettings(temperature=0, max_tokens=TOKENS, tool_choice="required", parallel_tool_calls=False)
    agent = Agent(name="gardener", model=model, model_settings=called, tools=[note], output_type=Day)
    check_day((await Runner.run(agent, QUESTION)).final_output)  # after the call; free text might never end
    check_day(noted[0])


async def main() -> None:
    """Both models."""
    set_tracing_disabled(True)  # it would send to OpenAI
    client = AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0)
    await use(OpenAIChatCompletionsModel(model=MODEL, openai_client=client))
    await use(OpenAIResponsesModel(model=MODEL, openai_client=client))


asyncio.run(main())
