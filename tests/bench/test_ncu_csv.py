"""bench/ncu_csv.py: the CSV of ncu in its two forms, and whose the launches are."""

import ncu_csv

# ncu --csv --page raw --print-units base: a column a metric, a row of units.
WIDE = """\
==PROF== Connected to process 4242 (/usr/bin/python3.12)
==PROF== Profiling "counters_marker" - 0: 0%....50%....100% - 1 pass
==PROF== Disconnected from process 4242
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",\
"Grid Size","Device","CC","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum",\
"launch__grid_size","launch__registers_per_thread"
"","","","","","","","","","","","byte","byte","ns","","register/thread"
"0","4242","python3.12","127.0.0.1","counters_marker","1","7","(128, 1, 1)","(1, 1, 1)","0","9.0",\
"0","32","1,024","1","16"
"1","4242","python3.12","127.0.0.1","_forward_kernel","1","7","(128, 1, 1)","(64, 2, 1)","0","9.0",\
"2,000,000","1,000,000","12,345","128","32"
"2","4242","python3.12","127.0.0.1","void at::native::f<(int)4, float>(int, T2)","1","7",\
"(128, 1, 1)","(3, 1, 1)","0","9.0","1,000","n/a","2,000","3","40"
"3","4242","python3.12","127.0.0.1","counters_marker","1","7","(128, 1, 1)","(2, 1, 1)","0","9.0",\
"0","0","1,000","2","16"
"""
# The default page: a row a metric, each with its unit, here none of the base ones.
LONG_HEAD = ('"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream",'
             '"Block Size","Grid Size","Device","CC","Section Name","Metric Name","Metric Unit",'
             '"Metric Value"\n')
LONG_ROW = ('"{}","1","python","127.0.0.1","{}","1","7","(128, 1, 1)","({}, 1, 1)","0","9.0",'
            '"Command line profiler metrics","{}","{}","{}"\n')


def test_the_csv_with_a_column_a_metric():
    launches = ncu_csv.parse(WIDE)
    assert [launch.name for launch in launches[:2]] == ["counters_marker", "_forward_kernel"]
    assert launches[1].grid == 128
    assert launches[1].metrics[ncu_csv.READ] == 2e6 and launches[1].metrics[ncu_csv.TIME] == 12345
    assert launches[1].metrics[ncu_csv.REGISTERS] == 32
    assert ncu_csv.WRITTEN not in launches[2].metrics
    found = ncu_csv.attributed(launches)
    assert [len(found[index]) for index in (0, 1)] == [2, 0]


def test_the_csv_with_a_row_a_metric_in_any_unit():
    rows = [(0, "counters_marker", 3, ncu_csv.TIME, "usecond", "1.5"),
            (1, "f", 4, ncu_csv.READ, "Gbyte", "1.25"), (1, "f", 4, ncu_csv.WRITTEN, "Kibyte", "2"),
            (1, "f", 4, ncu_csv.TIME, "ms", "1,000.5")]
    text = "==PROF== said\n" + LONG_HEAD + "".join(LONG_ROW.format(*row) for row in rows)
    (launch,) = ncu_csv.attributed(ncu_csv.parse(text))[2]
    assert launch.metrics == {ncu_csv.READ: 1.25e9, ncu_csv.WRITTEN: 2048, ncu_csv.TIME: 1000.5e6}
    assert ncu_csv.parse("==ERROR== nothing\n") == []
