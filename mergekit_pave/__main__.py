from mergekit_pave.cli import main

main()
