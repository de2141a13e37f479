"""The presence of this file lets the tests of subfolders import the helpers of this folder."""
