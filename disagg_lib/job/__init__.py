"""What travels with a job and runs on compute nodes: the agent, the measuring client, the search of the target QPS.

Comes in: job/settings.json and the job's environment. Goes out: phases, progress and LoadGen's logs in the run folder.
The whole folder is copied into each run as job/program, so it imports nothing of ours from outside; the agent needs
Python 3.8 and its standard library, the client numpy and LoadGen besides.
"""
