"""What can be made a dataset, and by which command: `python -m prepare`."""

READERS = """\
Each command makes a dataset folder of its raw files; --help lists its flags.

python -m prepare.table       your own tables: --interactions FILE --items FILE --domain DOMAIN
    CSV, TSV, JSON Lines or Parquet, also with .gz. A row of the interactions has a user, an item
    and a time (a number or ISO 8601); a row of the items has the item's id and texts.
python -m prepare.mind        MIND, as published: --raw DIR
    news.tsv and behaviors.tsv: tab-separated, without a header.
python -m prepare.amazon_m2   Amazon-M2 (KDD Cup 2023), as published: --raw DIR
    products_train.csv and sessions_train.csv.
python -m prepare.recbole     RecBole's atomic files: --inter FILE --item FILE --domain DOMAIN
    Tab-separated, with types in the header. Events: user_id:token, item_id:token, timestamp:float;
    or sessions: user_id:token, item_id_list:token_seq, item_id:token. Items: item_id:token and
    texts, such as title:token_seq.
python -m prepare.demo        nothing: a synthetic shop, made from a seed

DOMAIN is products, news, or a JSON file with the words of another domain, which
python -m prepare.table --print-domain writes for you to edit. All take --out DIR.

python -m prepare.to_recbole  the other way: --data DIR (a dataset) as RecBole's atomic files
docs/data.md describes the readers, their defaults, and the dataset's schema."""


if __name__ == "__main__":
    print(READERS)
