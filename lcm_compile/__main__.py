from lcm_compile.cli import main

main()
