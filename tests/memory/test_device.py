"""A device against a model, and its promises one by one."""

from hypothesis import settings

from tests.memory.machine import DeviceMachine

TestDeviceAgainstModel = DeviceMachine.TestCase
TestDeviceAgainstModel.settings = settings(max_examples=60, stateful_step_count=40)
